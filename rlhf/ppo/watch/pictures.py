"""Pictures of PPO runs: rows of metrics.jsonl in, a matplotlib Figure out.

The noisy values of single steps are drawn faint, their moving average strong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...report.style import GREY, legend, looks_of, panels, styled
from .findings import Rows, Series, by_step, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["over_optimisation", "smooth", "watch", "watched"]

_BLUE, _ORANGE = "#0072b2", "#d55e00"
# title -> label -> (metric, colour); a panel is drawn if at least one of its metrics was measured
_WATCH: dict[str, dict[str, tuple[str, str]]] = {
    "reward": {
        "as trained on": ("reward/mean", "#009e73"),
        "nominal": ("reward/nominal", "#e69f00"),
        "worst case": ("reward/worst", "#d55e00"),
    },
    "gold reward": {"gold": ("gold/mean", "#000000")},
    "gap: nominal - worst case": {"gap": ("reward/gap", _BLUE)},
    "uncertainty, relative": {
        "disagreement of the heads": ("reward/disagreement_ratio", "#cc79a7"),
        "std that the heads predict": ("reward/head_std_ratio", "#56b4e9"),
    },
    "distance, 1: edge of the known": {
        "of the policy's responses": ("reward/distance", _BLUE),
        "of the reference": ("reward/distance_reference", GREY),
    },
    "foreign, %": {"foreign": ("text/foreign", _BLUE)},
    "KL, nats a response": {"kl": ("kl/sequence", _BLUE)},
    "chi-squared": {"chi2": ("kl/chi2", _BLUE)},
    "length, tokens": {"length": ("text/length", _BLUE)},
    "cut off, %": {"truncated": ("text/truncated", _BLUE)},
    "entropy, nats a token": {"entropy": ("policy/entropy", _BLUE)},
}


def smooth(values: Sequence[float]) -> Any:
    """Centred moving average over a tenth of the run (at least three steps if there are six), shorter at the ends."""
    array = np.asarray(values, dtype=float)
    reach = max(len(array) // 20, int(len(array) >= 6))
    total = np.concatenate([[0.0], array.cumsum()])
    places = np.arange(len(array))
    low, high = np.maximum(0, places - reach), np.minimum(len(array), places + reach + 1)
    return (total[high] - total[low]) / (high - low)


@styled
def over_optimisation(runs: Mapping[str, Rows], *, gold_label: str = "gold reward") -> Figure:
    """Proxy (left) and gold reward (right) against KL; an open dot is the start, a full dot the end.

    runs: name -> rows of metrics.jsonl. Without any gold reward only the left panel is drawn; runs without KL are left
    out.
    """
    joined = {name: by_step(rows) for name, rows in runs.items()}
    sides = [("Proxy reward, which PPO optimises", "proxy reward", "reward/mean")]
    if any(series(rows, "gold/mean").values for rows in joined.values()):
        sides.append(("Gold reward", gold_label, "gold/mean"))
    figure, cells = panels(len(sides), width=4.3 if len(sides) > 1 else 5.6, height=3.7)
    looks = {next(iter(runs)): {"color": _BLUE, "linestyle": "-"}} if len(runs) == 1 else looks_of(runs)
    for axes, (title, label, metric) in zip(cells, sides, strict=True):
        for name, rows in joined.items():
            _path(axes, rows, metric, name, looks[name])
        axes.set_title(title)
        axes.set_ylabel(label)
        axes.set_xlabel("KL from the reference, nats a response")
    if len(runs) > 1:
        legend(figure, cells[0])
    return figure


def _path(axes: Axes, rows: Rows, metric: str, name: str, look: Mapping[str, Any]) -> None:
    """Draw one run's path in the plane of KL and `metric`, step by step."""
    kl, value = series(rows, "kl/sequence"), series(rows, metric)
    both = sorted(set(kl.steps) & set(value.steps))
    if not both:
        return
    x, y = (np.array([dict(zip(*s, strict=True))[step] for step in both]) for s in (kl, value))
    axes.plot(x, y, "o", color=look["color"], markersize=3, alpha=0.25, markeredgewidth=0)
    x, y = smooth(x.tolist()), smooth(y.tolist())
    axes.plot(x, y, label=name, **look)
    axes.plot(x[0], y[0], "o", color=look["color"], markerfacecolor="white", markersize=6, zorder=3)
    axes.plot(x[-1], y[-1], "o", color=look["color"], markersize=6, zorder=3)


def watched(rows: Rows) -> dict[str, dict[str, tuple[Series, str]]]:
    """The panels of `watch` with measured metrics: title -> label -> (series, colour)."""
    found = {
        title: {label: (series(rows, metric), colour) for label, (metric, colour) in lines.items()}
        for title, lines in _WATCH.items()
    }
    found = {title: {label: pair for label, pair in lines.items() if pair[0].values} for title, lines in found.items()}
    return {title: lines for title, lines in found.items() if lines}


@styled
def watch(rows: Rows, *, relative_to: str = "the start") -> Figure:
    """Early signs of reward hacking over the steps: one panel per quantity that was measured.

    relative_to: the texts on which the heads' std and disagreement are 1 (dashed line).
    """
    kept = watched(by_step(rows))
    figure, cells = panels(len(kept), width=3.2, height=2.5)
    for axes, (title, lines) in zip(cells, kept.items(), strict=True):
        for label, (line, colour) in lines.items():
            values = np.array(line.values) * (100 if title.endswith("%") else 1)
            several = label if len(lines) > 1 or title.startswith("uncertainty") else None
            _curve(axes, line.steps, values, colour, several)
        if title.startswith("uncertainty"):
            axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
            title = f"uncertainty relative to {relative_to}"
        if title.endswith("%"):
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_title(title)
        axes.set_xlabel("step")
    handles = {label: h for a in cells for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def _curve(axes: Axes, steps: Sequence[int], values: Any, colour: str, label: str | None) -> None:
    if len(steps) >= 20:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(steps, smooth(values), color=colour, label=label)
    else:
        axes.plot(steps, values, "o-", color=colour, markersize=3.5, linewidth=1.5, label=label)
