"""Report `prudent study overoptimisation`: what wins, where it loses, when to use it; then the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...report.words import count, interval, markdown_table, signed, verdict
from . import policy_report
from .attacks import REFERENCE
from .rewards import TUNED

SHIPPED = "single, shipped before"
Numbers = Mapping[str, Any]


def markdown(metrics: Numbers) -> str:
    """The content of overoptimisation.md."""
    config = metrics["config"]
    samples = config["samples"]
    settings = len(config["pairs"]) * len(config["noise"])
    lines = [
        "# Which reward survives optimisation",
        "",
        f"Responses of `{config['model'] or 'SmolLM2-135M-Instruct'}`, ordered by a gold scorer, train every kind of "
        f"reward on features of its frozen trunk: {', '.join(map(str, config['pairs']))} pairs, "
        f"{' and '.join(f'{noise:.0%}' for noise in config['noise'])} of the labels flipped, "
        f"{count(config['seeds'], 'seed')}. Best-of-n then optimises each reward over {samples['candidates']} "
        f"candidates of each of {samples['held_out']} held-out prompts, of the reference policy alone or mixed with "
        "foreign ones (half repeated snippets, half shuffled words), and the gold scorer judges the picks. All "
        "golds are in standard deviations of the reference responses. Brackets: 95 % intervals over seeds and prompts.",
        "",
        f"    {metrics['command']}",
        "",
        *(f"- {line}" for line in findings(metrics)),
        "",
        "## Which differences are shown",
        "",
        f"Gold at n = {metrics['n'][-1]} less that of the tuned single head, where the interval leaves out 0.",
        "",
    ]
    for view, numbers in metrics["views"].items():
        lines += [f"### {_title(view)}", "", *markdown_table(_shown_rows(numbers["golds"], metrics["attacks"])), ""]
    lines += [
        "## What each distance sees",
        "",
        "AUROC of the distance for foreign texts against reference responses to the same held-out prompts. `beyond`: "
        "the share of these reference responses beyond distance 1, set to 5 % on training prompts. `read again` is the "
        "control: reference responses, .5 if nothing but the text matters.",
        "",
        *markdown_table(_auroc_rows(metrics["auroc"])),
        "",
        "## Every number",
        "",
        f"Constants: {metrics['choice']}. Then gold at n = {metrics['n'][-1]}, the mean over "
        f"{count(settings, 'setting')}, and the difference to the tuned single head. `turns`: the n with most gold.",
        "",
    ]
    for view, numbers in metrics["views"].items():
        lines += [f"### {_title(view)}", "", *markdown_table(_constant_rows(numbers["constants"])), ""]
        for gold, attacks in numbers["golds"].items():
            lines += [f"Gold: {gold}", "", *markdown_table(_gold_rows(attacks)), ""]
    if metrics["policy_gradient"]:
        lines += policy_report.section(config, metrics["policy_gradient"])
    return "\n".join(lines)


def _title(view: str) -> str:
    heads, distance = view.split(" | ")
    return f"Heads read {heads}, the distance reads {distance}"


def _shown_rows(golds: Mapping[str, Any], attacks: Sequence[str]) -> list[list[str]]:
    """An arm a row; a difference whose interval leaves out 0, else a dot."""
    rows = [["reward", *(f"{attack}: {gold}" for attack in attacks for gold in golds)]]
    for arm in next(iter(golds.values()))[attacks[0]]:
        found = [golds[gold][attack][arm]["difference"] for attack in attacks for gold in golds]
        shown = [verdict(values) != "no difference shown" for values in found]
        cells = [f"{values[0]:+.2f}" if is_shown else "." for values, is_shown in zip(found, shown, strict=True)]
        rows += [] if arm == TUNED else [[arm, *cells]]
    return rows


def _auroc_rows(auroc: Iterable[Numbers]) -> list[list[str]]:
    rows: list[list[str]] = []
    for row in auroc:
        kinds = row["kinds"]
        if not rows:
            rows.append(["taps", "R", "from the mean of", "beyond", *kinds])
        mean = "its prompt" if row["by_prompt"] else "all"
        cells = [" + ".join(row["taps"]), str(row["directions"]), mean, f"{row['beyond']:.1%}"]
        cells += [f"{found[0]:.2f}" for kind, found in kinds.items() if kind != "degenerate"]
        rows.append([*cells, f"{kinds['degenerate'][0]:.3f} {interval(kinds['degenerate'], 3)}"])
    return rows


def _constant_rows(constants: Numbers) -> list[list[str]]:
    rows = [["constant of", "gold of each value", "chosen", "by each tuning gold alone"]]
    for kind, found in constants.items():
        tried = ", ".join(f"{value:g}: {gold:+.2f}" for value, gold in zip(found["grid"], found["gold"], strict=True))
        alone = ", ".join(f"{gold} {value:g}" for gold, value in found["by_gold"].items())
        rows.append([kind, tried, f"{found['chosen']:g}", alone])
    return rows


def _gold_rows(attacks: Mapping[str, Numbers]) -> list[list[str]]:
    head = ["reward"]
    for attack in attacks:
        head += [f"{attack}: gold", "difference", "turns"]
    rows = [head]
    for arm in next(iter(attacks.values())):
        row = [arm]
        for numbers in attacks.values():
            found = numbers[arm]
            difference = "" if arm == TUNED else _starred(found["difference"])
            row += [f"{found['gold'][0]:+.2f} {interval(found['gold'])}", difference, str(found["turns"])]
        rows.append(row)
    return rows


def _starred(values: Sequence[float | None]) -> str:
    """A difference in bold if its interval leaves 0 out."""
    text = signed(values)
    return text if verdict(values) == "no difference shown" else f"**{text}**"


def findings(metrics: Numbers) -> list[str]:
    """Sentences decided by intervals, for every view."""
    lines = []
    n = metrics["n"][-1]
    for view, numbers in metrics["views"].items():
        golds = numbers["golds"]
        chosen = {kind: f"{kind} {found['chosen']:g}" for kind, found in numbers["constants"].items()}
        fit = _in_words(_sorted(golds, REFERENCE, SHIPPED, opposite=True))
        lines.append(
            f"{_title(view)}. The fit: at n = {n} of the reference policy, the tuned single head brings {fit} against "
            "the one shipped before."
        )
        for kind in ("trust quad", "trust hinge"):
            parts = [
                f"{_where(attack)} {_in_words(_sorted(golds, attack, chosen[kind]))}" for attack in metrics["attacks"]
            ]
            lines.append(f"The price ({chosen[kind]}) against the tuned single head: {'; '.join(parts)}.")
        lines.append(f"Over-optimisation: {_turning(golds, metrics['attacks'], [TUNED, SHIPPED, *chosen.values()])}")
        lines.append(_advice(golds, chosen["trust hinge"]))
    runs = metrics.get("policy_gradient")
    return [*lines, *(policy_report.findings(metrics["config"], runs) if runs else [])]


def _sorted(golds: Mapping[str, Any], attack: str, arm: str, opposite: bool = False) -> dict[str, list[str]]:
    """higher, lower and "no difference shown" -> the golds of which the interval says so, with their values."""
    found: dict[str, list[str]] = {"higher": [], "lower": [], "no difference shown": []}
    for gold, attacks in golds.items():
        values = attacks[attack][arm]["difference"]
        if opposite:
            value, low, high = values
            values = [-value, -high, -low]
        found[verdict(values)].append(f"{gold} {signed(values)}")
    return found


def _in_words(found: Mapping[str, Sequence[str]]) -> str:
    parts = [
        f"{words} ({', '.join(found[key])})"
        for key, words in (
            ("higher", "more gold"),
            ("lower", "less gold"),
            ("no difference shown", "no difference shown"),
        )
        if found[key]
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _where(attack: str) -> str:
    return "from the reference policy" if attack == REFERENCE else f"with {attack} candidates"


def _turning(golds: Mapping[str, Any], attacks: Sequence[str], arms: Sequence[str]) -> str:
    """Which rewards are over-optimised: gold falls over the last factor 4 of n."""
    parts = []
    for attack in attacks:
        falling = [
            f"{arm} ({gold})"
            for gold, found in golds.items()
            for arm in dict.fromkeys(arms)
            if verdict(found[attack][arm]["trend"]) == "lower"
        ]
        parts.append(f"{_where(attack)} gold falls over the last factor 4 of n for {', '.join(falling) or 'none'}")
    return "; ".join(parts) + "."


def _advice(golds: Mapping[str, Any], arm: str) -> str:
    """When to use a price on distance, from the intervals of one priced arm."""
    said = {
        gold: {attack: verdict(found[arm]["difference"]) for attack, found in attacks.items()}
        for gold, attacks in golds.items()
    }
    foreign = {gold: {v for attack, v in by.items() if attack != REFERENCE} for gold, by in said.items()}
    helps = [gold for gold, found in foreign.items() if "higher" in found and "lower" not in found]
    hurts = [gold for gold, found in foreign.items() if "lower" in found]
    costs = [gold for gold, by in said.items() if by[REFERENCE] == "lower"]
    text = f"When to use {arm}: "
    if helps:
        text += f"where a policy can leave the reference's text and the true reward is like {' or '.join(helps)}; "
    else:
        text += "no gain is shown under foreign candidates; "
    text += f"not where it is like {' or '.join(hurts)}, which keeps paying there; " if hurts else ""
    where = f"it costs gold ({', '.join(costs)})" if costs else "no loss is shown"
    return f"{text}on the reference's own candidates {where}."
