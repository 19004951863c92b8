"""Draw the roofline (Williams et al. 2009): each op under the machine's measured read and matrix rates.

Cases of the same intensity would overlap, so they are drawn side by side, in the table's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..rlhf.job.files import atomic_write_text
from ..rlhf.report.style import GREY, OTHERS, label_left, legend, panels, save_png, styled, to_svg
from .machine import Machine
from .measure import Row

_COLOURS = {
    "ensemble_reward": "#0072b2",
    "preference_step": "#009e73",
    "linear_logprob": "#d55e00",
    "advantages": "#e69f00",
}
_MARKS = {"ours": ("o", True), "eager": ("o", False), "compiled": ("s", False)}  # marker, filled


def draw(rows: Sequence[Row], machine: Machine, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths ([] if no case has a time). ImportError without matplotlib."""
    timed = [row for row in rows if row.timings and row.flops]
    if not timed:
        return []
    figure = _figure(timed, machine)
    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    save_png(figure, png)
    atomic_write_text(svg, to_svg(figure) + "\n")
    return [png, svg]


@styled
def _figure(rows: Sequence[Row], machine: Machine) -> Any:
    dtypes = [d for d in machine.matrix if any(row.dtype == d for row in rows)]
    figure, cells = panels(len(dtypes), width=5.4, height=4.2, columns=2, sharey=True)
    for axes, dtype in zip(cells, dtypes, strict=True):
        _panel(axes, [row for row in rows if row.dtype == dtype], machine, dtype)
    label_left(cells, "GFLOP/s")
    legend(figure, cells[0], columns=3 * len(cells))
    return figure


def _panel(axes: Any, rows: Sequence[Row], machine: Machine, dtype: str) -> None:
    intensities = [row.flops / row.bytes_moved for row in rows]
    top, bandwidth = machine.matrix[dtype], machine.bandwidth
    x = np.geomspace(min(intensities) / 2, max([*intensities, top / bandwidth]) * 2, 200)
    axes.plot(x, np.minimum(x * bandwidth, top) / 1e9, color="black", linewidth=1.4, label="measured ceiling")
    for row, place in zip(rows, _side_by_side(intensities), strict=True):
        rates = {name: row.flops / row.timings[name].median / 1e9 for name in _MARKS if name in row.timings}
        axes.vlines(place, min(rates.values()), max(rates.values()), color=GREY, linewidth=0.6, zorder=1)
        for name, rate in rates.items():
            marker, filled = _MARKS[name]
            colour = _COLOURS.get(row.op, OTHERS[0])
            face = colour if filled else "white"
            axes.plot(place, rate, marker, color=colour, markerfacecolor=face, markersize=5, linestyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("FLOP a byte of the floor")
    axes.set_title(f"{dtype}: {bandwidth / 1e9:.0f} GB/s read, {top / 1e9:.0f} GFLOP/s")
    for op in dict.fromkeys(row.op for row in rows):
        axes.plot([], [], "o", color=_COLOURS.get(op, OTHERS[0]), linestyle="none", label=op)
    for name, (marker, filled) in _MARKS.items():
        face = GREY if filled else "white"
        axes.plot([], [], marker, color=GREY, markerfacecolor=face, linestyle="none", label=name)


def _side_by_side(intensities: Sequence[float]) -> list[float]:
    """Positions of the cases on the x axis: cases within 4 % of each other are drawn 7 % apart, around their true
    position.
    """
    order = sorted(range(len(intensities)), key=lambda i: intensities[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and intensities[i] < 1.04 * intensities[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    places = list(intensities)
    for group in groups:
        for step, i in enumerate(sorted(group)):
            places[i] = intensities[group[0]] * 1.07 ** (step - (len(group) - 1) / 2)
    return places


def _plain_ticks(axis: Any) -> None:
    """Ticks at 1, 2, 5, 10: over one or two decades, powers of ten are too few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
