"""Report `prudent study stochastic`: tables, findings and curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..report.style import label_left, legend, panels, styled
from ..report.words import interval, markdown_table, signed, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"constant": "#0072b2", "worst of random": "#009e73", "random": "#d55e00"}


def markdown(metrics: dict[str, Any]) -> str:
    """The content of stochastic.md."""
    config, minimum = metrics["config"], metrics["minimum"]
    oracle = [[k, f"{mean:.4f}", f"{variance:.4f}"] for k, (mean, variance) in metrics["oracle"].items()]
    rows = [["update", "reward", "degradation", "95 %", "less than random by, paired, 95 %", ""]]
    for name, arms in metrics["settings"].items():
        for arm, row in arms.items():
            cells = [name, arm, f"{row['degradation'][0]:.4f}", interval(row["degradation"], 4)]
            less = row["less_than_random"]
            rows.append([*cells, *(["", ""] if arm == "random" else [signed(less, 3), _shown(less)])])
    lines = [
        "# Rewards that mean nothing: lemma 1's stochastic case",
        "",
        f"BRME (arXiv 2409.15360, 6.2, appendix E): {config['steps']} PPO steps on a constant, on the minimum of "
        f"{config['heads']} random heads and on one random head, each N(0, 1). Here on {config['seeds']} policies of "
        f"the toy (8 prompts, 8 responses) that give the right response probability {config['start']:g}; the "
        "degradation is how much of that probability is lost.",
        "",
        f"    {metrics['command']}",
        "",
        f"{config['samples']} samples a prompt and step, one epoch unless named, clip {config['clip']:g}, Adam at "
        f"{config['adam_lr']:g}, SGD at {config['sgd_lr']:g}, an exact critic.",
        "",
        *(f"- {line}" for line in findings(metrics)),
        "",
        "## Degradation of gold",
        "",
        *markdown_table(rows),
        "",
        "## The minimum of K iid N(0, 1), by quadrature",
        "",
        *markdown_table([["K", "mean", "variance"], *oracle]),
        "",
        f"The minimum of {config['heads']} has std {minimum['std']:.3f} against 1, and a longer left tail. Steps of "
        "SGD scale with the noise; Adam and whitening divide its scale away, so that only the shape of the noise "
        "differs between the two random arms.",
        "",
    ]
    return "\n".join(lines)


def findings(metrics: dict[str, Any]) -> list[str]:
    """State under how many updates the intervals show the paper's order, and lemma 1 holds."""
    settings = metrics["settings"]
    ordered, exact = [], []
    for name, arms in settings.items():
        loss = [arms[arm]["degradation"][0] for arm in ("constant", "worst of random", "random")]
        less = {verdict(arms[arm]["less_than_random"]) for arm in ("constant", "worst of random")}
        ordered += [name] if loss[0] < loss[1] < loss[2] and less == {"higher"} else []
        exact += [name] if loss[0] == 0 else []
    return [
        "The paper's order (a constant hurts least, then the worst of random, then random) is shown under "
        f"{len(ordered)} of {len(settings)} updates{': ' if ordered else ''}{', '.join(ordered)}.",
        f"Lemma 1: a constant reward leaves gold unchanged to the bit under {len(exact)} of {len(settings)} updates.",
    ]


def _shown(less_than_random: list[float]) -> str:
    return verdict(less_than_random, "hurts less", "hurts more")


@styled
def picture(metrics: dict[str, Any]) -> Figure:
    """Gold over the steps, one panel per update: means over seeds."""
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
