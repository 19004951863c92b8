"""Report `prudent study toy`: tables, findings, and figure 1 redrawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.style import GREY, looks_of, styled
from ..report.words import interval, markdown_table, signed, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("optimal actors", "95 %", "prompts right of 8", "95 %", "minus single, paired, 95 %", "own best found")


def markdown(metrics: dict[str, Any]) -> str:
    """The content of toy.md: what was run, findings, and the tables of arms, lambda and settings."""
    config, seeds = metrics["config"], metrics["config"]["seeds"]
    reward, policy = config["reward"], config["policy"]
    models = ", ".join(f"{value:.2f}" for value in metrics["reward_models_right"])
    lines = [
        "# The toy of BRME's figure 1",
        "",
        "arXiv 2409.15360, section 4: PPO on one reward model goes wrong, PPO on the trade-off with the worst of three "
        f"more reaches the optimal actor. Here over {seeds} seeds, each with its own pairs, reward models and "
        "policies; the arms of a seed share all three and all random numbers.",
        "",
        f"    {metrics['command']}",
        "",
        f"Not in the paper, chosen here: reward models of {reward['layers']} hidden layers of {reward['width']} "
        f"{reward['activation']}, initial weights {reward['scale']:g} times torch's, {reward['steps']} Adam steps at "
        f"{reward['lr']:g}; a policy of 3 layers of {policy['width']} tanh, {policy['steps']} PPO steps of "
        f"{policy['epochs']} epochs on {policy['samples']} samples a prompt, clip {policy['clip']:g}, lr "
        f"{policy['lr']:g}, KL coefficient {policy['kl']:g} (the unit of reward is the nominal model's std over the 64 "
        "cells).",
        "",
        *(f"- {line}" for line in findings(metrics)),
        "",
        "## Arms",
        "",
        *markdown_table(
            [["PPO's reward", *_COLUMNS], *(_row(name, arm, seeds) for name, arm in metrics["arms"].items())]
        ),
        "",
        "`own best found`: the share of prompts where the policy's likeliest response is the one with the highest "
        "reward; near 100 % the outcome is due to the reward, not to PPO (not defined for eq. 6, whose reward depends "
        f"on the policy). The reward models rank {metrics['pairs_ranked_right']:.1%} of their pairs right, and by "
        f"themselves give the right response the highest reward for {models} of the 8 prompts, the nominal one first.",
        "",
        "## Lambda (lambda x the nominal model + (1 - lambda) x the worst of the set)",
        "",
        *markdown_table([["lambda", *_COLUMNS], *(_row(lam, arm, seeds) for lam, arm in metrics["lambda"].items())]),
        "",
    ]
    return "\n".join([*lines, *(_settings(metrics) if len(metrics["settings"]) > 1 else [])])


def findings(metrics: dict[str, Any]) -> list[str]:
    """State the intervals' conclusions, and counts over seeds and settings that the tables do not show."""
    arms, seeds = metrics["arms"], metrics["config"]["seeds"]
    name = next(arm for arm in arms if arm.startswith("tradeoff"))
    gain = arms[name]["right_minus_single"]
    shown = verdict(gain, "pessimism helps", "pessimism costs")
    pairs = list(zip(arms["single"]["right_by_seed"], arms[name]["right_by_seed"], strict=True))
    lines = [
        f"{name} minus the single reward model, prompts right of 8, paired by seed: {signed(gain)}: {shown}.",
        f"The paper's picture, a single model that fails and a trade-off that succeeds, occurs in "
        f"{sum(a < 8 == b for a, b in pairs)} of {seeds} seeds, its opposite in {sum(b < 8 == a for a, b in pairs)}.",
    ]
    others = [row for setting, row in metrics["settings"].items() if setting != "as above"]
    if others:
        verdicts = [verdict(row[name]["right_minus_single"]) for row in others]
        tally = ", ".join(f"{word} in {verdicts.count(word)}" for word in ("higher", "lower", "no difference shown"))
        lines.append(f"{name} against the single model in {len(others)} other settings: {tally}.")
    return lines


def _row(name: str, arm: dict[str, Any], seeds: int) -> list[str]:
    share = arm["optimal_share"]
    return [
        name,
        f"{arm['optimal']} of {seeds}",
        f"[{share[1]:.0%}, {share[2]:.0%}]",
        f"{arm['right'][0]:.2f}",
        interval(arm["right"]),
        signed(arm["right_minus_single"]),
        "" if "eq. 6" in name else f"{arm['followed']:.0%}",
    ]


def _settings(metrics: dict[str, Any]) -> list[str]:
    table, seeds = metrics["settings"], metrics["config"]["seeds"]
    names = list(next(iter(table.values())))
    head = ["setting", *(f"{name}: optimal, right" for name in names), f"{names[1]} minus single, paired, 95 %"]
    rows = []
    for setting, row in table.items():
        cells = [f"{row[name]['optimal']}, {row[name]['right'][0]:.2f}" for name in names]
        rows.append([setting, *cells, signed(row[names[1]]["right_minus_single"])])
    title = "## Dependence on settings that the paper does not give"
    return [title, "", f"One thing changed at a time, {seeds} seeds each.", "", *markdown_table([head, *rows]), ""]


@styled
def picture(metrics: dict[str, Any]) -> Figure:
    """Above, figure 1 for one seed: rewards and policies as heat maps; below, prompts right by arm and by lambda."""
    from matplotlib.figure import Figure

    example, arms = metrics["example"], metrics["arms"]
    figure = Figure(figsize=(11.5, 6.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.0, 1.45])
    upper, lower = halves
    like, seeds = example["like_figure_1"], metrics["config"]["seeds"]
    chosen_for = f"one of the {like} of {seeds} like the paper's figure" if like else "its gain is the median"
    upper.suptitle(
        f"Seed {example['seed']} ({chosen_for}): rows are prompts, columns responses, dots each row's greatest",
        fontsize=10,
    )
    shown = [(f"reward: {name}", table, "viridis") for name, table in example["rewards"].items()]
    policies = list(example["policies"])
    chosen = [policies[0], policies[1], next(p for p in policies if "worst of the set" in p), "mean of all"]
    shown += [(f"policy: {name}", example["policies"][name], "Greys") for name in chosen]
    for axes, (title, table, colours) in zip(upper.subplots(1, len(shown)), shown, strict=True):
        _heat_map(axes, title, np.array(table), colours)
    left, right = lower.subplots(1, 2, width_ratios=[1.5, 1])
    _bars(left, arms, metrics["config"]["seeds"])
    _lambdas(right, metrics)
    return figure


def _heat_map(axes: Any, title: str, table: Any, colours: str) -> None:
    limits = {"vmin": 0, "vmax": 1} if colours == "Greys" else {}
    axes.imshow(table, cmap=colours, **limits)
    best = table.argmax(axis=1)
    for prompt, response in enumerate(best):
        ink = "#009e73" if prompt == response else "#d55e00"
        axes.plot(response, prompt, "o", color=ink, markersize=6, markeredgecolor="white", markeredgewidth=0.8)
    axes.set_title(f"{title}\n{int((best == np.arange(len(best))).sum())} of 8 right", fontsize=8.5)
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)


def _bars(axes: Any, arms: dict[str, Any], seeds: int) -> None:
    looks = looks_of(arms)
    for row, (name, arm) in enumerate(arms.items()):
        value, low, high = arm["right"]
        axes.barh(row, value, color=looks[name]["color"], alpha=0.8, height=0.62)
        axes.plot([low, high], [row, row], color="#333333", linewidth=1.4)
        axes.text(8.15, row, f"{arm['optimal']} of {seeds} optimal", va="center", fontsize=8.5, color="#333333")
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set(
        xlim=(0, 10), ylim=(len(arms) - 0.5, -0.5), xlabel="prompts right of 8, mean over seeds (line: 95 % interval)"
    )
    axes.set_xticks(range(0, 9, 2))
    axes.grid(axis="y", visible=False)


def _lambdas(axes: Any, metrics: dict[str, Any]) -> None:
    rows = metrics["lambda"]
    x = [float(lam) for lam in rows]
    middle, low, high = zip(*(row["right"] for row in rows.values()), strict=True)
    axes.plot(x, middle, "o-", color="#009e73")
    axes.fill_between(x, low, high, color="#009e73", alpha=0.13, linewidth=0)
    axes.axhline(8, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
    axes.set(xlabel="lambda (1: the single model)", ylabel="prompts right of 8", ylim=(0, 8.4), title="The trade-off")
