"""The picture of `prudent study overoptimisation`: gold and proxy against n, and gold against KL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...report.style import GREY, styled
from .policy_report import panel
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
    """For each view a row of gold and one of proxy against n; then gold against KL, a row for each gold."""
    from matplotlib.figure import Figure

    views, golds = metrics["views"], metrics["config"]["golds"]
    columns = len(metrics["attacks"]) * len(golds)
    runs, given = metrics["policy_gradient"] or [], metrics["config"]["policy_gradient"]
    rows = 2 * len(views) + (len(given["golds"]) if runs else 0)
    figure = Figure(figsize=(2.7 * columns, 2.4 * rows + 0.6), layout="constrained")
    above, *below = figure.subfigures(
        2 if runs else 1, 1, height_ratios=[2 * len(views)] + [len(given["golds"])] * bool(runs), squeeze=False
    )[:, 0]
    cells = above.subplots(2 * len(views), columns, squeeze=False, sharex=True)
    for v, numbers in enumerate(views.items()):
        _best_of_n(cells[2 * v], cells[2 * v + 1], metrics, *numbers)
    if runs:
        panels = below[0].subplots(len(given["golds"]), len(given["kl"]), squeeze=False)
        for row, gold in zip(panels, given["golds"], strict=True):
            row[0].set_ylabel("gold, sd")
            for axes, kl in zip(row, given["kl"], strict=True):
                panel(axes, runs, gold, kl, _LOOKS)
    handles, labels = cells[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, handlelength=2.4)
    return figure


def _best_of_n(above: Any, below: Any, metrics: dict[str, Any], view: str, numbers: dict[str, Any]) -> None:
    """One view: a column for each attack and gold, gold in `above`, proxy in `below`."""
    constants, ns = numbers["constants"], metrics["n"]
    columns = [(attack, gold) for attack in metrics["attacks"] for gold in numbers["golds"]]
    for column, (attack, gold) in enumerate(columns):
        found = numbers["golds"][gold][attack]
        for kind, (colour, line) in _LOOKS.items():
            arm = f"{kind} {constants[kind]['chosen']:g}" if kind in constants else kind
            above[column].plot(ns, found[arm]["curve"], color=colour, linestyle=line, label=kind)
            below[column].plot(ns, found[arm]["proxy"], color=colour, linestyle=line)
        above[column].axhline(0, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
        above[column].set_xscale("log", base=2)
        read = view.replace(" | ", " |\n")  # in one line it would run into the next panel
        above[column].set_title(f"{gold}, {attack}" + (f"\n{read}" if column == 0 else ""), fontsize=9)
        below[column].set_xlabel("n")
    above[0].set_ylabel("gold, sd")
    below[0].set_ylabel("proxy, its own sd")
