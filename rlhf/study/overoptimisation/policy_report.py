"""Report the policy gradient part of `prudent study overoptimisation`: a table and panels for each gold and KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from ...evaluation.statistics import Interval
from ...report.words import markdown_table, signed, verdict
from .rewards import TUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]


def section(config: Mapping[str, Any], runs: Rows) -> list[str]:
    """The lines of the page."""
    given = config["policy_gradient"]
    lines = [
        "## Policy gradient",
        "",
        f"PPO with rloo, {given['mode']}, {given['steps']} steps of {given['prompts_per_step']} prompts x "
        f"{given['samples_per_prompt']} responses, heads of {given['pairs']} pairs with {given['noise']:.0%} noise, "
        f"view `{given['view'] or config['views'][-1]}`. Rewards are in their own sd within a prompt. Final: the mean "
        f"of the last {given['window']} steps. Differences are to the tuned single head, paired by seed, with "
        "Student's interval of 95 %.",
        "",
    ]
    for gold in given["golds"]:
        for kl in given["kl"]:
            lines += [f"### Gold: {gold}, KL coefficient {kl:g}", "", *markdown_table(_rows(runs, gold, kl)), ""]
    return lines


def by_arm(runs: Rows, gold: str, kl: float) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of one gold and KL coefficient by arm, in order of seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        if run["gold"] == gold and run["kl"] == kl:
            found.setdefault(run["arm"], []).append(run)
    return found


def _final(runs: Rows, name: str) -> list[float]:
    return [float(run["final"][name]) for run in runs]


def difference(runs: Rows, tuned: Rows) -> Interval:
    """Final gold less the tuned single head's: mean over seeds, with Student's interval."""
    from scipy.stats import t

    gaps = [a - b for a, b in zip(_final(runs, "gold/mean"), _final(tuned, "gold/mean"), strict=True)]
    if len(gaps) < 2:
        return Interval(gaps[0], None, None)
    half = float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return Interval(mean(gaps), mean(gaps) - half, mean(gaps) + half)


def _rows(runs: Rows, gold: str, kl: float) -> list[list[str]]:
    arms = by_arm(runs, gold, kl)
    rows = [["reward", "final gold", "by seed", "difference", "KL, nats", "reward, sd"]]
    for arm, found in arms.items():
        final = _final(found, "gold/mean")
        rows.append(
            [
                arm,
                f"{mean(final):+.2f}",
                " ".join(f"{value:+.2f}" for value in final),
                "" if arm == TUNED else _starred(difference(found, arms[TUNED])),
                f"{mean(_final(found, 'kl/sequence')):.1f}",
                f"{mean(_final(found, 'reward/mean')):+.1f}",
            ]
        )
    return rows


def _starred(values: Interval) -> str:
    text = signed(values)
    return text if verdict(values) == "no difference shown" else f"**{text}**"


def findings(config: Mapping[str, Any], runs: Rows) -> list[str]:
    """A sentence for each KL coefficient, decided by the intervals."""
    lines = []
    for kl in config["policy_gradient"]["kl"]:
        said: dict[str, list[str]] = {"higher": [], "lower": []}
        for gold in config["policy_gradient"]["golds"]:
            arms = by_arm(runs, gold, kl)
            for arm, found in arms.items():
                values = difference(found, arms[TUNED])
                if arm != TUNED and verdict(values) in said:
                    said[verdict(values)].append(f"{arm} ({gold} {signed(values)})")
        lines.append(
            f"Policy gradient at KL {kl:g}: more gold than the tuned single head for "
            f"{', '.join(said['higher']) or 'none'}; less for {', '.join(said['lower']) or 'none'}."
        )
    return lines


def panel(axes: Axes, runs: Rows, gold: str, kl: float, looks: Mapping[str, tuple[str, Any]]) -> None:
    """Gold against KL, means over seeds of the curves' points."""
    for arm, found in by_arm(runs, gold, kl).items():
        colour, line = next((look for kind, look in looks.items() if arm.startswith(kind)), ("#8a8a8a", "-"))
        x, y = (
            [mean(point) for point in zip(*(run["curves"][name] for run in found), strict=True)]
            for name in ("kl/sequence", "gold/mean")
        )
        axes.plot(x, y, color=colour, linestyle=line, label=arm)
    axes.set_title(f"PPO, {gold}, KL coefficient {kl:g}", fontsize=9)
    axes.set_xlabel("KL from the reference, nats")
