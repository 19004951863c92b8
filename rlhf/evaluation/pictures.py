"""Pictures of reward models and trainings: tensors in, a matplotlib Figure out, without pyplot or other state.

Needs the extra `report`. The style is in report/style.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..report.style import (
    GREY,
    OTHERS,
    array,
    common_bins,
    label_left,
    legend,
    looks_of,
    panels,
    save_png,
    styled,
    to_svg,
)
from .statistics import Bin, Interval, covariance, normalised_area

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "accuracy",
    "coverage",
    "head_correlation",
    "margins",
    "penalties",
    "reliability",
    "save_png",
    "scoring",
    "std_histogram",
    "to_svg",
    "training_curves",
]


@styled
def accuracy(intervals: Mapping[str, Interval], *, label: str = "pair accuracy, %") -> Figure:
    """A dot and a 95 % interval for each scorer, the first at the top."""
    figure, (axes,) = panels(1, width=6.4, height=0.9 + 0.3 * len(intervals))
    looks = looks_of(intervals)
    for row, (name, interval) in enumerate(intervals.items()):
        if interval.value is None:
            continue
        if interval.low is not None and interval.high is not None:
            axes.plot(
                [100 * interval.low, 100 * interval.high], [row, row], color=looks[name]["color"], solid_capstyle="butt"
            )
        axes.plot(100 * interval.value, row, "o", color=looks[name]["color"], markersize=6)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{label} (bar: 95 % bootstrap interval)")
    return figure


@styled
def margins(values: Mapping[str, Tensor]) -> Figure:
    """Histograms of `normalised_margin` (BRME Fig. 6): scorer name -> [P], in the scorer's own standard deviations.

    The part at or below 0, the pairs ranked wrong, is grey.
    """
    figure, cells = panels(len(values), width=2.7, height=2.7, columns=4, sharex=True, sharey=True)
    arrays = {name: array(v) for name, v in values.items()}
    bins = common_bins(arrays.values(), 18)
    looks = looks_of(values)
    for axes, (name, margin) in zip(cells, arrays.items(), strict=True):
        each = 100 / max(1, len(margin))
        for part, colour in ((margin[margin > 0], looks[name]["color"]), (margin[margin <= 0], "#bdbdbd")):
            axes.hist(part, bins=bins, weights=np.full(len(part), each), color=colour)
        axes.axvline(0, color="#444444", linewidth=1)
        axes.set_title(f"{name}\n{100 * (margin <= 0).mean():.1f} % wrong")
        axes.set_xlabel("margin, std")
        axes.tick_params(labelbottom=True)
    label_left(cells, "share of pairs, %")
    return figure


@styled
def coverage(rewards: Mapping[str, tuple[Tensor, Tensor]], *, label: str = "reward") -> Figure:
    """BRME Fig. 7: chosen (x) against rejected (y) with the one-std ellipse, one panel per scorer.

    rewards: scorer name -> (chosen [P], rejected [P]); pairs below the dashed diagonal are ranked right. The ellipse's
    area is in units of the scorer's variance (`normalised_area`). Panels share a scale unless their rewards' spreads
    differ by more than a factor of four.
    """
    from matplotlib.patches import Ellipse

    figure, cells = panels(len(rewards), width=2.8, height=3.1, columns=4)
    looks = looks_of(rewards)
    for axes, (name, (chosen, rejected)) in zip(cells, rewards.items(), strict=True):
        x, y = array(chosen), array(rejected)
        colour = looks[name]["color"]
        axes.axline((0, 0), slope=1, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
        alpha = min(0.6, max(0.08, 60 / max(1.0, len(x)) ** 0.75))
        axes.scatter(x, y, s=7, color=colour, alpha=alpha, linewidths=0, rasterized=True)
        values, vectors = np.linalg.eigh(covariance(chosen, rejected).numpy())
        width, height = 2 * np.sqrt(values.clip(min=0))[::-1]
        angle = math.degrees(math.atan2(vectors[1, 1], vectors[0, 1]))
        for ink, line in (("white", 3.2), ("#222222", 1.5)):
            ellipse = Ellipse(
                (x.mean(), y.mean()), width, height, angle=angle, fill=False, edgecolor=ink, linewidth=line
            )
            axes.add_patch(ellipse)
        axes.set_title(f"{name}\narea / own std²: {normalised_area(chosen, rejected):.2f}")
        limits = _limits([pair for pair in rewards.values() if _alike(pair, (chosen, rejected))])
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.set_xlabel(f"chosen {label}")
    label_left(cells, f"rejected {label}")
    return figure


def _alike(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    spreads = [float(np.std(np.concatenate([array(side) for side in pair]))) for pair in (first, second)]
    return max(spreads) <= 4 * min(spreads)


def _limits(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    pooled = np.concatenate([array(side) for pair in pairs for side in pair])
    edge = 0.04 * (np.ptp(pooled) or 1.0)
    return float(pooled.min() - edge), float(pooled.max() + edge)


@styled
def reliability(bins: Mapping[str, Sequence[Bin]], *, auroc: Mapping[str, Interval] | None = None) -> Figure:
    """Accuracy in bins of an uncertainty signal, most certain pairs on the left; a useful signal makes it fall.

    bins: signal name -> `statistics.reliability`; auroc: signal name -> its AUROC for errors (0.5: chance).
    """
    figure, cells = panels(len(bins), width=3.1, height=3.1, sharey=True)
    for axes, (name, rows) in zip(cells, bins.items(), strict=True):
        sizes = np.array([row.size for row in rows], dtype=float)
        right = np.array([row.accuracy.value for row in rows], dtype=float)
        middle = 100 * (sizes.cumsum() - sizes / 2) / max(1.0, sizes.sum())
        low = np.array(
            [row.accuracy.low if row.accuracy.low is not None else row.accuracy.value for row in rows], dtype=float
        )
        high = np.array(
            [row.accuracy.high if row.accuracy.high is not None else row.accuracy.value for row in rows], dtype=float
        )
        axes.axhline(
            100 * (right * sizes).sum() / max(1.0, sizes.sum()), color=GREY, linewidth=1, linestyle=(0, (3, 2))
        )
        axes.fill_between(middle, 100 * low, 100 * high, color="#0072b2", alpha=0.13, linewidth=0)
        axes.plot(middle, 100 * right, "o-", color="#0072b2", markersize=4)
        found = auroc.get(name) if auroc else None
        axes.set_title(name if found is None or found.value is None else f"{name}: AUROC {found.value:.2f}")
        axes.set_xlim(0, 100)
        axes.set_xlabel("pairs, most to least certain, %")
    label_left(cells, "accuracy, %")
    return figure


@styled
def head_correlation(matrices: Mapping[str, Any]) -> Figure:
    """Heat maps of [K, K] correlations between heads: title -> tensor or nested lists (None, NaN: a constant head)."""
    figure, cells = panels(len(matrices), width=3.3, height=3.3)
    for axes, (name, matrix) in zip(cells, matrices.items(), strict=True):
        values = array(matrix)
        size = len(values)
        axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_xticks(range(size))
        axes.set_yticks(range(size))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for i in range(size if size <= 12 else 0):
            for j in range(size):
                dark = abs(values[i, j]) > 0.6
                text = f"{values[i, j]:.2f}" if math.isfinite(values[i, j]) else "-"
                axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "#222222")
        axes.set_title(name)
        axes.set_xlabel("head")
        axes.set_ylabel("head")
    figure.colorbar(cells[0].images[0], ax=cells, shrink=0.8, label="correlation")
    return figure


@styled
def scoring(under: Mapping[str, float]) -> Figure:
    """BRME Fig. 5b: responses scored below (left) and above (right) the given score; scorer name -> share below."""
    figure, (axes,) = panels(1, width=6.4, height=1.2 + 0.32 * len(under))
    rows, low = list(range(len(under))), 100 * np.array(list(under.values()))
    axes.barh(rows, low, height=0.62, color="#d55e00", label="under-scored")
    axes.barh(rows, 100 - low, left=low, height=0.62, color="#56b4e9", label="over-scored or equal")
    for row, share in zip(rows, low, strict=True):
        axes.text(1.5, row, f"{share:.0f} %", va="center", color="white", fontsize=9)
    axes.axvline(50, color="white", linewidth=1.2)
    axes.set_yticks(rows, list(under))
    axes.set_ylim(len(under) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 25))
    axes.grid(visible=False)
    axes.set_xlabel("responses, % (standardised reward against standardised given score)")
    legend(figure, axes)
    return figure


@styled
def training_curves(history: Sequence[Mapping[str, Any]], *, x: str = "step") -> Figure:
    """One panel per metric of records such as those of metrics.jsonl; `train/loss` and `eval/loss` share a panel.

    Records without `x`, `time`, and values that are not finite numbers are skipped.
    """
    series: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for record in history:
        for key, value in record.items():
            if key in (x, "step", "time", "epoch") or x not in record or not _is_number(value):
                continue
            prefix, _, metric = key.rpartition("/")
            steps, values = series.setdefault(metric, {}).setdefault(prefix or metric, ([], []))
            steps.append(float(record[x]))
            values.append(float(value))
    if not series:
        raise ValueError(
            f"training_curves: expected records with {x!r} and a number beside it, got {len(history)} without"
        )
    names = [name for name in dict.fromkeys(p for panel in series.values() for p in panel) if name not in series]
    colours = {name: ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")[i % 5] for i, name in enumerate(names)}
    figure, cells = panels(len(series), width=3.1, height=2.4)
    for axes, (metric, panel) in zip(cells, series.items(), strict=True):
        for prefix, (steps, values) in panel.items():
            mark = "o-" if len(steps) <= 12 else "-"
            axes.plot(
                steps, values, mark, color=colours.get(prefix, "#0072b2"), markersize=3.5, label=prefix, linewidth=1.5
            )
        axes.set_title(metric.replace("_", " "))
        axes.set_xlabel(x)
    handles = {
        label: h for a in cells for h, label in zip(*a.get_legend_handles_labels(), strict=True) if label in colours
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    return figure


@styled
def penalties(curve: Sequence[Mapping[str, float]], chosen: float) -> Figure:
    """Held-out log-loss against the L2 penalty, with one standard error; the chosen penalty has an open circle.

    curve: "l2", "log_loss" and "standard_error" of each penalty.
    """
    l2, loss, error = ([point[name] for point in curve] for name in ("l2", "log_loss", "standard_error"))
    figure, (axes,) = panels(1, width=4.2, height=2.8)
    axes.errorbar(l2, loss, error, fmt="o-", color="#0072b2", markersize=3.5, linewidth=1.5, elinewidth=1)
    axes.axhline(math.log(2), color=GREY, linestyle="--", linewidth=1)
    axes.plot(chosen, loss[l2.index(chosen)], "o", color="#d55e00", markersize=9, fillstyle="none", markeredgewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlabel("L2 penalty")
    axes.set_ylabel("held-out log-loss")
    return figure


@styled
def std_histogram(samples: Mapping[str, Tensor], *, label: str = "predicted std of the nominal head") -> Figure:
    """Histograms of std, or of another signal, for samples of several sources, such as training data and the policy."""
    figure, (axes,) = panels(1, width=6.4, height=3.4)
    arrays = {name: array(values) for name, values in samples.items()}
    bins = common_bins(arrays.values(), 20)
    for index, (name, values) in enumerate(arrays.items()):
        colour = ("#0072b2", "#d55e00", *OTHERS)[index % 7]
        weights = np.full(len(values), 100 / max(1, len(values)))
        axes.hist(values, bins=bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.22)
        axes.hist(values, bins=bins, weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("share of responses, %")
    legend(figure, axes)
    return figure


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
