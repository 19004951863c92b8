"""Report `prudent study warning`: a table of signals, one sentence, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...report.style import GREY, styled
from ...report.words import count, interval, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def markdown(metrics: Mapping[str, Any]) -> str:
    """The content of warning.md."""
    config = metrics["config"]
    rows = [["signal", "false alarms allowed", "of held-out runs", "recall", "95 %", "lead, steps", "95 %", "median"]]
    for signal, by_share in metrics["signals"].items():
        for share, found in by_share.items():
            lead = found["lead"]
            rows.append(
                [
                    signal,
                    f"{float(share):.0%}",
                    f"{found['false_alarms'][0]:.0%}",
                    f"{found['recall'][0]:.0%}",
                    interval(found["recall"]),
                    "" if lead[0] is None else f"{lead[0]:.1f}",
                    interval(lead, 1),
                    "" if found["median_lead"] is None else f"{found['median_lead']:g}",
                ]
            )
    lines = [
        "# What warns before gold falls",
        "",
        f"{count(metrics['runs'], 'PPO run')}, in {metrics['fallen']} of which gold falls: it stays more than "
        f"{config['fall']:g} below its maximum to the end. A signal is the change from its first {config['window']} "
        f"steps, averaged over {config['window']} steps. Its threshold comes from the runs with another "
        f"{config['hold_out']} in which gold stays: the smallest that at most the given share of them ever cross. "
        "Recall: the share of the falls with an alarm no later than the fall. Lead: steps from the alarm to the fall.",
        "",
        f"    {metrics['command']}",
        "",
        finding(metrics),
        "",
        *markdown_table(rows),
        "",
    ]
    return "\n".join(lines)


def finding(metrics: Mapping[str, Any]) -> str:
    """Which signals warn in time for more than half of the falls, by the interval."""
    share = min(next(iter(metrics["signals"].values())), key=float)
    found = {name: by_share[share] for name, by_share in metrics["signals"].items()}
    good = [
        f"{name} ({numbers['recall'][0]:.0%}, {numbers['median_lead']:g} steps ahead)"
        for name, numbers in found.items()
        if numbers["recall"][1] > 0.5 and numbers["median_lead"]
    ]
    said = f"With {float(share):.0%} false alarms allowed, "
    if not good:
        return f"{said}no signal is shown to warn in time of more than half of the falls."
    return f"{said}these are shown to warn in time of more than half of the falls: {', '.join(good)}."


@styled
def picture(metrics: Mapping[str, Any]) -> Figure:
    """Recall and lead of every signal at each share of false alarms, with their intervals."""
    from matplotlib.figure import Figure

    names = list(metrics["signals"])
    shares = list(next(iter(metrics["signals"].values())))
    figure = Figure(figsize=(9, 0.36 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, share in enumerate(shares):
        places = [row + 0.18 * (i - (len(shares) - 1) / 2) for row in range(len(names))]
        colour = ("#0072b2", "#d55e00", "#009e73")[i % 3]
        for axis, key in zip(axes, ("recall", "lead"), strict=True):
            for place, name in zip(places, names, strict=True):
                value, low, high = metrics["signals"][name][share][key]
                if value is None:
                    continue
                axis.plot(value, place, "o", color=colour, markersize=4)
                if low is not None:
                    axis.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axes[0].plot([], [], "o-", color=colour, label=f"{float(share):.0%} false alarms allowed")
    axes[0].axvline(0.5, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
    axes[0].set(title="falls with an alarm in time", xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5))
    axes[0].set_yticks(range(len(names)), names)
    axes[1].set(title="steps from alarm to fall")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shares))
    return figure
