"""The picture of `prudent study overoptimisation`: gold and proxy against n."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...report.style import GREY, styled
from .rewards import TUNED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOKS: dict[str, tuple[str, Any]] = {
    TUNED: ("#000000", "-"),
    "single, shipped before": ("#000000", (0, (4, 1.5))),
    "ensemble WCO": ("#d55e00", "-"),
    "BRME tradeoff:0.4": ("#009e73", "-"),
    "posterior LCB": ("#e69f00", "-"),
    "trust quad": ("#0072b2", "-"),
    "trust hinge": ("#56b4e9", "-"),
}


@styled
def picture(metrics: dict[str, Any]) -> Figure:
    """For each view two rows of panels, one for each attack and gold: gold (solid panel) above, proxy below."""
    from matplotlib.figure import Figure

    views, attacks, ns = metrics["views"], metrics["attacks"], metrics["n"]
    golds = list(next(iter(views.values()))["golds"])
    rows, columns = 2 * len(views), len(attacks) * len(golds)
    figure = Figure(figsize=(2.7 * columns, 2.4 * rows + 0.6), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for v, (view, numbers) in enumerate(views.items()):
        for column, (attack, gold) in enumerate((attack, gold) for attack in attacks for gold in golds):
            found = numbers["golds"][gold][attack]
            above, below = cells[2 * v][column], cells[2 * v + 1][column]
            for kind, (colour, line) in _LOOKS.items():
                constants = numbers["constants"]
                arm = f"{kind} {constants[kind]['chosen']:g}" if kind in constants else kind
                above.plot(ns, found[arm]["curve"], color=colour, linestyle=line, label=kind)
                below.plot(ns, found[arm]["proxy"], color=colour, linestyle=line)
            above.axhline(0, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
            above.set_xscale("log", base=2)
            above.set_title(f"{gold}, {attack}" + (f"\n{view}" if column == 0 else ""), fontsize=9)
        cells[2 * v][0].set_ylabel("gold, sd")
        cells[2 * v + 1][0].set_ylabel("proxy, its own sd")
    for cell in cells[-1]:
        cell.set_xlabel("n")
    handles, labels = cells[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, handlelength=2.4)
    return figure
