"""What `prudent study stochastic` shows: the oracle, the table, what follows from it, the curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..report.style import label_left, legend, panels, styled
from ..report.words import interval, signed, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"constant": "#0072b2", "worst of random": "#009e73", "random": "#d55e00"}


def markdown(metrics: dict[str, Any]) -> str:
    """stochastic.md."""
    config, minimum = metrics["config"], metrics["minimum"]
    seeds = config["seeds"]
    lines = [
        "# Rewards that mean nothing: lemma 1's stochastic case",
        "",
        f"BRME (arXiv 2409.15360, 6.2, appendix E): {config['steps']} PPO steps on a constant, on the least of "
        f"{config['heads']} random heads and on one, each N(0, 1). Here on {seeds} policies of the toy (8 prompts, 8 "
        f"responses) that give the right response probability {config['start']:g}; the loss of it is the degradation.",
        "",
        f"    {metrics['command']}",
        "",
        f"{config['samples']} samples a prompt and step, one epoch where none is named, clip {config['clip']:g}, Adam "
        f"at {config['adam_lr']:g}, SGD at {config['sgd_lr']:g}, an exact critic.",
        "",
        "## The oracle",
        "",
        "The least of K iid N(0, 1), by quadrature:",
        "",
        "| K | mean | variance |",
        "|---|---|---|",
        *(f"| {k} | {mean:.4f} | {variance:.4f} |" for k, (mean, variance) in metrics["oracle"].items()),
        "",
        "## What came out",
        "",
        *(f"- {line}" for line in findings(metrics)),
        "",
        "## Degradation of gold",
        "",
        "| update | reward | degradation | 95 % | less than random by, paired, 95 % |",
        "|---|---|---|---|---|",
    ]
    for name, arms in metrics["settings"].items():
        for arm, row in arms.items():
            value = row["degradation"]
            less = "" if arm == "random" else signed(row["less_than_random"], 3)
            lines.append(f"| {name} | {arm} | {value[0]:.4f} | {interval(value, 4)} | {less} |")
    lines += [
        "",
        f"The least of {config['heads']} has std {minimum['std']:.3f} against 1, and a longer tail on the left. Small "
        "steps of SGD are as large as the noise; Adam and whitening divide its scale away, and then only the shape of "
        "the noise differs between the two random arms.",
        "",
    ]
    return "\n".join(lines)


def findings(metrics: dict[str, Any]) -> list[str]:
    """One sentence an update, by its intervals."""
    lines = []
    for name, arms in metrics["settings"].items():
        constant, worst = (verdict(arms[arm]["less_than_random"]) for arm in ("constant", "worst of random"))
        loss = {arm: row["degradation"][0] for arm, row in arms.items()}
        change = {arm: 0.0 - value for arm, value in loss.items()}  # 0.0 - 0.0 prints no minus
        words = {"higher": "less than", "lower": "MORE than", "no difference shown": "no differently from"}
        ordered = loss["constant"] < loss["worst of random"] < loss["random"] and constant == worst == "higher"
        lines.append(
            f"{name}: gold changes by {change['random']:+.3f} on random rewards, by {change['worst of random']:+.3f} "
            f"on the worst of them (hurts {words[worst]} random) and by {change['constant']:+.3f} on a constant (hurts "
            f"{words[constant]} random): the paper's order {'holds' if ordered else 'is not shown'}."
        )
    exact = [name for name, arms in metrics["settings"].items() if arms["constant"]["degradation"][0] == 0]
    lines.append(
        f"Lemma 1: a constant reward leaves gold as it was, to the bit, under {len(exact)} of the "
        f"{len(metrics['settings'])} updates."
    )
    return lines


@styled
def picture(metrics: dict[str, Any]) -> Figure:
    """Gold over the steps, a panel an update: means over seeds."""
    figure, cells = panels(len(metrics["settings"]), width=3.4, height=2.9, sharey=True)
    for axes, (name, arms) in zip(cells, metrics["settings"].items(), strict=True):
        for arm, row in arms.items():
            axes.plot(row["curve"], label=arm, color=_COLOURS[arm])
        axes.set_title(name)
        axes.set_xlabel("PPO step")
        axes.tick_params(labelbottom=True)
    label_left(cells, "probability of the right response")
    legend(figure, cells[0])
    return figure
