"""Write the HTML report of a PPO run: one page without external files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...evaluation import pictures as house_plots
from ...report.page import render_page
from ...report.style import to_svg
from ...report.words import count, plain_text
from ..config import PPOConfig
from . import pictures
from .findings import Rows, block_length, by_step, change, ends, findings, series

TITLES = {  # metric -> its name in the table, in the table's order
    "reward/mean": "proxy reward",
    "reward/nominal": "nominal",
    "reward/worst": "worst case",
    "reward/gap": "gap: nominal - worst case",
    "gold/mean": "gold reward",
    "reward/disagreement": "disagreement of the heads",
    "reward/disagreement_ratio": "disagreement, relative to {versus}",
    "reward/distance": "distance from the reference responses",
    "reward/distance_reference": "distance of {versus}",
    "text/foreign": "share foreign: beyond distance 1",
    "reward/head_std": "std that the heads predict",
    "reward/head_std_ratio": "predicted std, relative to {versus}",
    "kl/sequence": "KL, nats a response",
    "kl/token": "KL, nats a token",
    "kl/chi2": "chi-squared",
    "policy/entropy": "entropy, nats a token",
    "text/length": "length, tokens",
    "text/truncated": "share cut off",
    "value/explained_variance": "explained variance of the critic",
    "time/tokens_per_second": "tokens a second",
    "memory/peak_gib": "peak memory, GiB",
}
_SHARES = ("text/truncated", "text/foreign")
_UNSIGNED = {"head_std": "std", "distance": "distance"}  # number of a sample -> its name
_UPDATE = (
    "policy/loss",
    "value/loss",
    "policy/clip_fraction",
    "policy/update_kl",
    "policy/grad_norm",
    "value/explained_variance",
)


def render(
    config: PPOConfig, metrics_rows: Rows, samples_rows: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any]
) -> str:
    """Render the report as HTML.

    Args:
        config: the run's resolved config.
        metrics_rows: the lines of metrics.jsonl; a metric may be absent, or None if it was not finite.
        samples_rows: the lines of samples.jsonl.
        outcome: the content of ppo.json. Every key is optional: `stopped` (why the run ended early, a sentence or
            None), `rolled_back_to` (the step whose policy is kept, or None), `steps` (steps done), `policy` (from
            `describe_policy`), `reward` (the reward's source), `seconds` (duration of the run).

    Raises ImportError, naming the extra, without jinja2 or matplotlib.
    """
    rows = by_step(metrics_rows)
    stopped, back = outcome.get("stopped"), outcome.get("rolled_back_to")
    return render_page(
        "ppo_template.html",
        config=config,
        title=f"{count(len(rows), 'step')} of {_estimator(config)}",
        findings=findings(rows, steps=outcome.get("steps"), rolled_back_to=back),
        stopped=stopped,
        seconds=_duration(outcome.get("seconds")),
        block=block_length(len(rows)),
        versus=versus(config),
        several=bool(series(rows, "reward/disagreement").values),
        has_gold=bool(series(rows, "gold/mean").values),
        has_distance=bool(series(rows, "reward/distance").values),
        table=table(rows, versus(config)),
        figures=_figures(config, rows),
        samples=before_and_after(samples_rows, back),
        facts=_facts(config, rows, outcome),
        changed=_changed(config),
        settings=config.model_dump(mode="json"),
    )


def versus(config: PPOConfig) -> str:
    """Name the texts to which the heads' std and disagreement are relative."""
    return "the preference data" if config.data else "the start"


def table(rows: Rows, versus: str = "the start") -> dict[str, Any]:
    """{"head", "rows"} as text: metric, start, end, and the change with its interval if there are enough steps."""
    lines = []
    for name, title in TITLES.items():
        found = series(by_step(rows), name)
        both = ends(found)
        if both is None:
            continue
        moved = None if name.startswith(("time/", "memory/", "reward/distance_reference")) else change(found)
        if moved is not None and name in _SHARES:
            moved = moved.within(1)
        lines.append(
            [title.format(versus=versus), *(number(value) for value in both), "" if moved is None else str(moved)]
        )
    return {"head": ["", "start", "end", "change [95 %]"], "rows": lines}


def number(value: float | None) -> str:
    """Three decimals below 1000, else four significant digits; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def before_and_after(samples_rows: Sequence[Mapping[str, Any]], end: int | None = None) -> list[dict[str, Any]]:
    """For each prompt the first sample `before` (first step) and `after` (last step): {"step", "response", "gold",
    "facts"}.

    end: the step that the run was rolled back to, if it was; later samples are ignored.
    `after` is None if there is only one step; a prompt without a sample at both steps is left out.
    """
    steps = [row["step"] for row in samples_rows if end is None or row["step"] <= end]
    if not steps:
        return []
    first, last = min(steps), max(steps)
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in samples_rows:
        if row["step"] in (first, last):
            found.setdefault(plain_text(row["prompt"]), {}).setdefault(row["step"], row)
    return [
        {
            "prompt": prompt,
            "before": _sample(sides[first]),
            "after": _sample(sides[last]) if last != first else None,
        }
        for prompt, sides in found.items()
        if first in sides and last in sides
    ]


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = []
    for key, word in (("gold", "gold"), ("reward", "reward"), ("worst", "worst case"), *_UNSIGNED.items()):
        value = row.get(key)
        if isinstance(value, int | float):
            parts.append(f"{word} {value:{'.2f' if key in _UNSIGNED else '+.2f'}}")
    if row.get("length") is not None:
        parts.append(f"{row['length']} tokens")
    if row.get("stopped") is False:
        parts.append("cut off")
    gold = row.get("gold")
    return {
        "step": row["step"],
        "response": row["response"],
        "gold": "" if gold is None else f"{gold:+.2f}",
        "facts": ", ".join(parts),
    }


def _figures(config: PPOConfig, rows: Rows) -> dict[str, str]:
    if not rows:
        return {}
    figures = {}
    if series(rows, "kl/sequence").values and series(rows, "reward/mean").values:
        label = f"gold reward ({config.gold})" if config.gold else "gold reward"
        figures["over_optimisation"] = pictures.over_optimisation({"policy": rows}, gold_label=label)
    if pictures.watched(rows):
        figures["watch"] = pictures.watch(rows, relative_to=versus(config))
    update = [{key: value for key, value in row.items() if key in ("step", *_UPDATE)} for row in rows]
    if any(series(update, name).values for name in _UPDATE):
        figures["training"] = house_plots.training_curves(update)
    return {name: to_svg(figure) for name, figure in figures.items()}


def _facts(config: PPOConfig, rows: Rows, outcome: Mapping[str, Any]) -> dict[str, str]:
    """What the settings alone do not tell: the reward and the policy as they were loaded, and the steps done."""
    configured = f"{config.reward.source} ({config.reward.kind}), {config.reward.aggregation}"
    facts = {"reward": str(outcome.get("reward", "")).removeprefix("reward source: ") or configured}
    if outcome.get("policy"):
        facts["policy"] = str(outcome["policy"]).removeprefix("policy: ")
    return facts | {"steps": f"{len(rows)} of {config.steps}"}


def _changed(config: PPOConfig) -> dict[str, str]:
    """Dotted key -> value as JSON of every key that differs from its default; required keys are left out."""
    defaults = _flat(PPOConfig.model_construct().model_dump(mode="json", warnings=False))
    values = _flat(config.model_dump(mode="json"))
    return {
        key: json.dumps(value, ensure_ascii=False)
        for key, value in values.items()
        if key in defaults and value != defaults[key]
    }


def _estimator(config: PPOConfig) -> str:
    return {"gae": "PPO", "rloo": "RLOO", "group": "group-relative PPO"}[config.update.estimator]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups of keys as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _duration(seconds: object) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
