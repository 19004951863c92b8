"""The style of every picture: colours, panels, legends, and saving as PNG or SVG.

Colours are Okabe and Ito's, which colour-blind readers can distinguish; a scorer has the same colour in every picture.
Legends are below the axes, never on the data.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from torch import Tensor

from ..job.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

GREY = "#8a8a8a"
_SCORERS: dict[str, tuple[str, Any]] = {  # the first word of a scorer's name -> colour, line style
    "single": ("#000000", (0, (4, 1.5))),
    "tuned": ("#000000", (0, (4, 1.5))),  # the single head too
    "mean": ("#0072b2", "-"),
    "nominal": ("#e69f00", "-"),
    "worst": ("#d55e00", "-"),
    "tradeoff": ("#009e73", "-"),
    "trust": ("#cc79a7", "-"),
}
OTHERS = ("#56b4e9", "#5d4a8a", "#7a7a00", "#8c564b", "#117733")
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "prudent",  # equal pictures give equal bytes
}


def require_matplotlib() -> None:
    """Raise ImportError, naming the extra, if pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'prudent[report]'") from None


def _context() -> Any:
    require_matplotlib()
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _context():
            return function(*args, **kwargs)

    return drawn


def panels(
    count: int, *, width: float = 3.5, height: float = 3.0, columns: int = 3, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most `columns` per row; unused cells are removed."""
    from matplotlib.figure import Figure

    if count == 0:
        raise ValueError("plots: expected at least one series to draw, got none")
    rows = math.ceil(count / columns)
    columns = math.ceil(count / rows)  # six panels in two rows of three, not of four and two
    figure = Figure(figsize=(max(4.6, width * columns), height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    cells = list(axes.flat)
    for cell in cells[count:]:
        cell.remove()
    return figure, cells[:count]


def looks_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and line style of each scorer: fixed for known scorers, the next free one for others."""
    looks: dict[str, dict[str, Any]] = {}
    taken: set[str] = set()
    others = 0
    for name in names:
        word = name.replace(":", " ").split(" ")[0].lower()
        if word == "head":
            look: tuple[str, Any] = (GREY, "-")  # heads are not distinguished
        elif word in _SCORERS and word not in taken:
            taken.add(word)
            look = _SCORERS[word]
        else:
            look = (OTHERS[others % len(OTHERS)], ("-", (0, (4, 1.5)))[others // len(OTHERS) % 2])
            others += 1
        looks[name] = {"color": look[0], "linestyle": look[1]}
    return looks


def legend(figure: Any, axes: Axes, columns: int = 4) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), handlelength=2.4)


def label_left(cells: Sequence[Axes], label: str) -> None:
    """Set the y label of the first panel in each row."""
    for axes in cells:
        spec = axes.get_subplotspec()
        if spec is not None and spec.is_first_col():
            axes.set_ylabel(label)


def array(values: Any) -> Any:
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)


def common_bins(arrays: Iterable[Any], per_side: int) -> Any:
    """Bin edges shared by all arrays; if 0 is inside their range it is an edge, so no bin contains both signs."""
    pooled = np.concatenate([values.ravel() for values in arrays])
    low, high = (pooled.min(), pooled.max()) if len(pooled) else (0.0, 1.0)
    if not high > low:
        return np.array([low - 0.5, low + 0.5])
    step = (high - low) / (2 * per_side)
    first = math.floor(low / step) * step if low < 0 < high else low
    return first + step * np.arange(math.ceil((high - first) / step - 1e-9) + 1)


def save_png(figure: Figure, path: Path | str) -> Path:
    """Write the figure at 150 dpi atomically: `path` holds the old picture or the complete new one."""
    with _context(), atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return Path(path)


def to_svg(figure: Figure) -> str:
    """The figure as one `<svg>` element for an HTML page; text becomes outlines, so no font is needed."""
    text = io.StringIO()
    with _context():
        figure.savefig(text, format="svg", dpi=150, metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :].strip()
