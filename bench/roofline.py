"""The roofline (Williams et al. 2009): what each op reaches under the machine's measured read and matrix rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..rlhf.files import atomic_write_text
from ..rlhf.plot_style import GREY, OTHERS, label_left, legend, panels, save_png, styled, to_svg
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
    """Write STEM.png and STEM.svg; [] if nothing has a time. ImportError without matplotlib."""
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
    figure, cells = panels(len(dtypes), width=4.6, height=4.0, columns=2, sharey=True)
    for axes, dtype in zip(cells, dtypes, strict=True):
        _panel(axes, [row for row in rows if row.dtype == dtype], machine, dtype)
    label_left(cells, "GFLOP/s")
    legend(figure, cells[0], columns=3 * len(cells))
    return figure


def _panel(axes: Any, rows: Sequence[Row], machine: Machine, dtype: str) -> None:
    intensities = [row.flops / row.bytes_moved for row in rows]
    top, bandwidth = machine.matrix[dtype], machine.bandwidth
    x = np.geomspace(min(intensities) / 3, max([*intensities, top / bandwidth]) * 3, 200)
    axes.plot(x, np.minimum(x * bandwidth, top) / 1e9, color="black", linewidth=1.4, label="measured ceiling")
    for row, intensity in zip(rows, intensities, strict=True):
        rates = {name: row.flops / row.timings[name].median / 1e9 for name in _MARKS if name in row.timings}
        axes.vlines(intensity, min(rates.values()), max(rates.values()), color=GREY, linewidth=0.6, zorder=1)
        for name, rate in rates.items():
            marker, filled = _MARKS[name]
            colour = _COLOURS.get(row.op, OTHERS[0])
            face = colour if filled else "white"
            axes.plot(intensity, rate, marker, color=colour, markerfacecolor=face, markersize=6, linestyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte of the floor")
    axes.set_title(f"{dtype}: {bandwidth / 1e9:.0f} GB/s read, {top / 1e9:.0f} GFLOP/s")
    for op in dict.fromkeys(row.op for row in rows):
        axes.plot([], [], "o", color=_COLOURS.get(op, OTHERS[0]), label=op)
    for name, (marker, filled) in _MARKS.items():
        axes.plot([], [], marker, color=GREY, markerfacecolor=GREY if filled else "white", label=name)
