"""Report `prudent study learning`: a table for each KL coefficient, example texts, and curves."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from ..report.style import GREY, styled
from ..report.words import count, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SINGLE = "single head"
_COLOURS = {"mean of heads": "#56b4e9", "max of heads": "#e69f00", "worst head of the step": "#0072b2"}


def markdown(metrics: dict[str, Any]) -> str:
    """The content of learning.md."""
    config, rewards = metrics["config"], list(metrics["rewards"].values())
    ppo, data = config["ppo"], config["rewards"]
    reference = mean(row["gold_reference"] for row in rewards)
    best = mean(row["gold_best_of_16"] for row in rewards)
    accuracy = ", ".join(
        f"{name.replace('_', ', ').replace('pet', 'PET')} {mean(row['accuracy'][name] for row in rewards):.1%}"
        for name in rewards[0]["accuracy"]
    )
    lines = [
        "# PPO against each reward: gold beside proxy",
        "",
        f"PPO trains `{config['model']}` on a reward; VADER's compound sentiment of its responses is gold, which PPO "
        f"never sees. Every seed draws {data['samples_per_prompt']} samples a prompt, orders "
        f"{data['pairs_per_prompt']} pairs of them by gold with {data['label_noise']:.0%} of the labels flipped, and "
        "trains all rewards on them: heads on the frozen trunk's features.",
        "",
        f"    {metrics['command']}",
        "",
        f"{ppo['steps']} steps of {count(ppo['prompts_per_step'], 'prompt')} x {ppo['samples_per_prompt']} samples of "
        f"at most {data['max_new_tokens']} tokens, {ppo['estimator']}, {ppo['mode']}, lr {ppo['lr']:g}, epochs "
        f"{ppo['epochs']}, minibatches {ppo['minibatches']}. Final: the mean of the last {config['window']} steps; "
        f"peak: the best {config['window']} in a row, selected for being high, so that some of the fall from it is "
        "chance. The unit of proxies is a head's standard deviation over the reference's own samples; PET's rewards "
        "are scaled to their start. Each number: mean and standard deviation over seeds. A few seeds carry no "
        "interval: the last column says what holds in every seed.",
        "",
        f"Gold of the untrained model: {reference:+.3f}; of its best of 16 by gold itself: {best:+.3f}. Held-out pairs "
        f"ranked right, true labels: {accuracy} ({sum(row['held_out_pairs'] for row in rewards)} pairs).",
        "",
    ]
    for kl in config["kl"]:
        lines += [f"## {_kl_title(kl)}", "", *markdown_table(table(metrics, kl)), "", *_texts(metrics, kl), ""]
    return "\n".join(lines)


def table(metrics: dict[str, Any], kl: float) -> list[list[str]]:
    """A header, then a row for each reward under one KL coefficient."""
    head = ["reward", "final gold", "by seed", "peak gold", "final - peak", "final proxy", "KL, nats", "length"]
    rows = [[*head, "cut off", "final gold in every seed"]]
    arms = by_arm(metrics, kl)
    untrained = [metrics["rewards"][str(run["seed"])]["gold_reference"] for run in arms[SINGLE]]
    single = [_final(run) for run in arms[SINGLE]]
    for arm, runs in arms.items():
        gold = [_final(run) for run in runs]
        final = [run["final"] for run in runs]
        always = [_always(gold, untrained, "untrained"), _always(gold, single, SINGLE)]
        rows.append(
            [
                arm,
                _spread(gold),
                " ".join(f"{value:+.2f}" for value in gold),
                _spread([run["peak_gold"] for run in runs]),
                f"{mean(_final(run) - run['peak_gold'] for run in runs):+.3f}",
                _spread([f["reward/mean"] for f in final], 2),
                _spread([f["kl/sequence"] for f in final], 1, ""),
                f"{mean(f['text/length'] for f in final):.1f}",
                f"{mean(f['text/truncated'] for f in final):.0%}",
                ", ".join(filter(None, always)),
            ]
        )
    return rows


def _always(values: Sequence[float], others: Sequence[float], name: str) -> str:
    """ "above NAME" or "below NAME" if that holds in every seed, else ""."""
    pairs = list(zip(values, others, strict=True))
    if all(value > other for value, other in pairs):
        return f"above {name}"
    return f"below {name}" if all(value < other for value, other in pairs) else ""


def by_arm(metrics: dict[str, Any], kl: float) -> dict[str, list[dict[str, Any]]]:
    """The runs of one KL coefficient by arm, in the order of the config."""
    table: dict[str, list[dict[str, Any]]] = {}
    for run in metrics["runs"]:
        if run["kl"] == kl:
            table.setdefault(run["arm"], []).append(run)
    return table


def _kl_title(kl: float) -> str:
    return "No KL" if kl == 0 else f"KL coefficient {kl:g}"


def _final(run: dict[str, Any]) -> float:
    return float(run["final"]["gold/mean"])


def _texts(metrics: dict[str, Any], kl: float) -> list[str]:
    """One text of each run of the first seed, not selected: the first prompt, then after a bar the response."""
    lines = [f"Texts at the end, the first prompt of seed {metrics['config']['first_seed']}:", ""]
    return lines + [f"- {arm}: {' '.join(runs[0]['text'].split())}" for arm, runs in by_arm(metrics, kl).items()]


def _spread(values: Sequence[float], digits: int = 3, sign: str = "+") -> str:
    if len(values) < 2:
        return f"{values[0]:{sign}.{digits}f}"
    return f"{mean(values):{sign}.{digits}f} ± {stdev(values):.{digits}f}"


@styled
def picture(metrics: dict[str, Any]) -> Figure:
    """One row per KL coefficient: gold and proxy over the steps, gold over KL, final gold; means over seeds."""
    from matplotlib.figure import Figure

    kls, steps = metrics["config"]["kl"], metrics["config"]["ppo"]["steps"]
    figure = Figure(figsize=(13, 3.7 * len(kls) + 0.9), layout="constrained")
    rows = figure.subplots(len(kls), 4, squeeze=False, width_ratios=[1, 1, 1, 0.9])
    reference = mean(row["gold_reference"] for row in metrics["rewards"].values())
    for axes, kl in zip(rows, kls, strict=True):
        _row_of_panels(axes, by_arm(metrics, kl), kl, steps, reference)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, handlelength=2.4)
    return figure


def _row_of_panels(axes: Any, table: dict[str, list[dict[str, Any]]], kl: float, steps: int, reference: float) -> None:
    for place, (arm, runs) in enumerate(table.items()):
        look = _look(arm)
        gold, proxy, distance = (
            _mean_curve([run["curves"][name] for run in runs]) for name in ("gold/mean", "reward/mean", "kl/sequence")
        )
        x = [(i + 0.5) * steps / len(gold) for i in range(len(gold))]
        axes[0].plot(x, gold, label=arm, **look)
        axes[1].plot(x, proxy, **look)
        axes[2].plot(distance, gold, **look)
        values = [_final(run) for run in runs]
        axes[3].plot(values, [place] * len(values), "o", color=look["color"], markersize=4, alpha=0.5)
        axes[3].plot([mean(values)] * 2, [place - 0.3, place + 0.3], color=look["color"], linewidth=2.5)
    for cell in (axes[0], axes[2]):
        cell.axhline(reference, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
    axes[3].axvline(reference, color=GREY, linewidth=1, linestyle=(0, (3, 2)))
    axes[0].set(title=f"{_kl_title(kl)}: gold reward", xlabel="step", ylabel="gold")
    axes[1].set(title="proxy reward", xlabel="step", ylabel="proxy, std")
    axes[2].set(title="gold reward against distance", xlabel="KL from the reference, nats", ylabel="gold")
    axes[3].set(title="final gold: seeds, mean", xlabel="gold", ylim=(len(table) - 0.5, -0.5))
    axes[3].set_yticks(range(len(table)), list(table), fontsize=8)


def _look(arm: str) -> dict[str, Any]:
    """Lambdas from blue to yellow, the single head black, other combinations of heads dotted, PET dashed."""
    import matplotlib

    if arm == SINGLE:
        return {"color": "#000000", "linestyle": "-"}
    if arm in _COLOURS:
        return {"color": _COLOURS[arm], "linestyle": (0, (1, 1.2))}
    if arm.startswith("PET"):
        return {"color": "#d55e00" if "single" in arm else "#cc79a7", "linestyle": (0, (4, 1.5))}
    return {"color": matplotlib.colormaps["viridis"](0.9 * float(arm.removeprefix("lambda "))), "linestyle": "-"}


def _mean_curve(curves: Sequence[Sequence[float | None]]) -> list[float]:
    """The mean of each block of steps over the runs that have a number there."""
    return [mean(known) for values in zip(*curves, strict=False) if len(known := [v for v in values if v is not None])]
