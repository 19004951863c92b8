"""The demo's own pictures: gold against n in each pool, the distances of each kind of text, the steps of PPO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..ppo.watch.findings import by_step, series
from ..report.style import GREY, label_left, legend, looks_of, panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def gold_against_n(panels_of: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], gold_label: str) -> Figure:
    """A panel for each pool: the gold reward of each reward's pick against n, with its 95 % interval.

    panels_of: title of the panel -> `attack.as_dict`.   titles: reward's name -> its title; others are not drawn.
    """
    figure, cells = panels(len(panels_of), width=4.3, height=3.6, columns=2, sharey=True)
    looks = looks_of(titles.values())
    for axes, (title, found) in zip(cells, panels_of.items(), strict=True):
        n = found["n"]
        for name, label in titles.items():
            rows = found["scorers"][name]
            axes.plot(n, [row["value"] for row in rows], marker="o", markersize=3.5, label=label, **looks[label])
            low, high = ([row[end] for row in rows] for end in ("low", "high"))
            axes.fill_between(n, low, high, color=looks[label]["color"], alpha=0.13, linewidth=0)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        ticks = n[:: math.ceil(len(n) / 8)]
        axes.set_xticks(ticks, [str(number) for number in ticks])
        axes.minorticks_off()
        axes.set_xlabel("n, candidates to choose from")
    label_left(cells, gold_label)
    legend(figure, cells[0])
    return figure


@styled
def distances(rows: Sequence[Mapping[str, Any]], own: Sequence[str], policies: Sequence[str]) -> Figure:
    """For each kind of text its median distance, the middle half and the middle 90 %; the edge of the known is 1.

    rows: of `distances.distance_rows`.   own, policies: kinds that are the model's own, and trained policies'.
    """
    figure, (axes,) = panels(1, width=7.0, height=0.9 + 0.28 * len(rows))
    for place, row in enumerate(rows):
        colour = "#0072b2" if row["kind"] in own else "#009e73" if row["kind"] in policies else "#d55e00"
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.2, solid_capstyle="butt")
        axes.plot([row["lower"], row["upper"]], [place, place], color=colour, linewidth=5, solid_capstyle="butt")
        axes.plot(row["median"], place, "o", color="white", markeredgecolor=colour, markersize=6)
    axes.axvline(1, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_xscale("log", base=2)
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    ticks = [2.0**k for k in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row["kind"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("distance from the reference responses (1: their 95 % quantile)")
    return figure


@styled
def steps(runs: Mapping[str, Sequence[Mapping[str, Any]]], gold_label: str) -> Figure:
    """Proxy reward, gold reward and the share of foreign responses at each step of PPO: the mean of its responses.

    Not against KL, which so few steps of so few responses measure too roughly.

    runs: name -> rows of metrics.jsonl.
    """
    sides = {"reward/mean": "proxy reward", "gold/mean": gold_label, "text/foreign": "share beyond distance 1"}
    figure, cells = panels(len(sides), width=2.9, height=2.9)
    looks = looks_of(runs)
    for axes, (metric, label) in zip(cells, sides.items(), strict=True):
        for name, rows in runs.items():
            found = series(by_step(rows), metric)
            axes.plot([step + 1 for step in found.steps], found.values, "o", ms=3.5, label=name, **looks[name])
        axes.set_title(label)
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True)
    legend(figure, cells[0])
    return figure
