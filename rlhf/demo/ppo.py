"""PPO in the demo: one short run on the single head and one on the ensemble, with gold and proxy reward of both.

The two runs differ only in the reward: they have the same language model, prompts (on which no reward head was trained)
and random numbers, so their first step has the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..evaluation.best_of_n import SINGLE, TITLES
from ..job.files import atomic_write_text
from ..job.log import read_metrics
from ..ppo.config import KLConfig, PolicyConfig, PPOConfig, RewardConfig, UpdateConfig
from ..ppo.loop import run_ppo
from ..ppo.watch.findings import block_length, by_step, difference, ends, headline, series
from ..ppo.watch.monitor import read_texts
from ..ppo.watch.report import before_and_after
from ..sampling.config import RolloutConfig
from .config import DemoPPOConfig

# folder of a run under ppo/ -> folder of its reward in the demo, title, aggregation
ARMS = {
    "single": ("single", TITLES[SINGLE], "mean"),
    "ensemble": ("model", TITLES["tradeoff:0.4"], "tradeoff:0.4,source=mean"),
}
SHOWN = {  # key in metrics.json -> metric of the run
    "proxy": "reward/mean",
    "gold": "gold/mean",
    "kl": "kl/sequence",
    "length": "text/length",
    "disagreement": "reward/disagreement",
}


class Start(NamedTuple):
    """The language model of both runs (folder or hub name), and how it is loaded and sampled."""

    model: str
    dtype: Literal["float32", "bfloat16"]
    temperature: float
    seed: int


def arm_config(name: str, ppo: DemoPPOConfig, start: Start, folder: Path) -> PPOConfig:
    """The config of the PPO run `name` (a key of ARMS) in the demo's folder."""
    source, _, aggregation = ARMS[name]
    return PPOConfig(
        model=start.model,
        prompts=str(folder / "ppo" / "prompts.txt"),
        output=folder / "ppo" / name,
        reward=RewardConfig(source=str(folder / source), kind="shared", aggregation=aggregation),
        steps=ppo.steps,
        seed=start.seed,
        dtype=start.dtype,
        policy=PolicyConfig(lora_rank=ppo.lora_rank, lora_alpha=2 * ppo.lora_rank),
        rollout=RolloutConfig(
            prompts_per_step=ppo.prompts_per_step,
            samples_per_prompt=ppo.samples_per_prompt,
            max_new_tokens=ppo.max_new_tokens,
            temperature=start.temperature,
        ),
        kl=KLConfig(coef=ppo.kl_coef),
        update=UpdateConfig(estimator="rloo", epochs=1, lr=ppo.lr),
        gold="vader",
        save_every=max(1, ppo.steps // 4),
        sample_every=max(1, ppo.steps),
    )


def run_arms(ppo: DemoPPOConfig, start: Start, folder: Path, prompts: Sequence[str], progress: bool) -> dict[str, Any]:
    """Run or resume both PPO runs, in ppo/single and ppo/ensemble of the demo's folder.

    prompts: prompts on which no head was trained.
    Returns the entry `ppo` of metrics.json: `as_dict`, and the number of `samples` in a step.
    """
    atomic_write_text(folder / "ppo" / "prompts.txt", "".join(prompt + "\n" for prompt in prompts))
    ppo = ppo.model_copy(update={"prompts_per_step": min(ppo.prompts_per_step, len(prompts))})
    for name in ARMS:
        run_ppo(arm_config(name, ppo, start, folder), resume=True, progress=progress)
    found = as_dict({name: read_metrics(folder / "ppo" / name) for name in ARMS})
    return found | {"samples": ppo.prompts_per_step * ppo.samples_per_prompt}


def as_dict(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """{"arms": arm -> {"title", "headline", key of SHOWN -> {"start", "end"}}, "findings": sentences}.

    rows: arm -> its lines of metrics.jsonl. Start and end are means over a block of steps (`findings.ends`).
    """
    arms: dict[str, Any] = {}
    for name, found in rows.items():
        steps = by_step(found)
        both = {key: ends(series(steps, metric)) for key, metric in SHOWN.items()}
        arms[name] = {"title": ARMS[name][1], "headline": headline(steps)} | {
            key: None if pair is None else {"start": pair[0], "end": pair[1]} for key, pair in both.items()
        }
    return {"steps": len(by_step(rows["single"])), "arms": arms, "findings": findings(rows)}


def findings(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """State in sentences what the two runs show, the comparison first."""
    single, ensemble = (series(by_step(rows[name]), "gold/mean") for name in ("single", "ensemble"))
    title = ARMS["ensemble"][1]
    apart = difference(single, ensemble)
    if apart is None:
        lines = ["PPO: too few steps to tell the two rewards apart."]
    else:
        sentence = {
            "rises": f"PPO: the policy trained on {title} ends with more gold reward than the one on the single head",
            "falls": f"PPO: the policy trained on {title} ends with less gold reward than the one on the single head",
        }.get(
            apart.verdict, f"PPO: no difference in gold reward is shown between {title} and the single head at the end"
        )
        lines = [f"{sentence} ({apart}). One seed is one observation."]
    for name in rows:
        lines.append(f"{ARMS[name][1][0].upper()}{ARMS[name][1][1:]}: {headline(by_step(rows[name]))}")
    return lines


def table_rows(ppo: Mapping[str, Any]) -> list[list[str]]:
    """A head row and one row per run: proxy, gold, KL and length from start to end, as text."""
    lines = [["trained on", "proxy", "gold", "KL, nats", "tokens"]]
    for arm in ppo["arms"].values():
        digits = {"proxy": "+.2f", "gold": "+.3f", "kl": ".2f", "length": ".1f"}
        cells = [
            "-" if arm[key] is None else f"{arm[key]['start']:{form}} to {arm[key]['end']:{form}}"
            for key, form in digits.items()
        ]
        lines.append([arm["title"], *cells])
    return lines


def page(folder: Path, ppo: Mapping[str, Any]) -> dict[str, Any]:
    """The PPO parts of the demo's page: the table, the rows of the picture, and responses of both policies."""
    texts = {}
    for name in ARMS:
        texts[name] = before_and_after(read_texts(folder / "ppo" / name))
    prompts = (folder / "ppo" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    samples = []
    for i, pair in enumerate(texts["single"]):
        if i < len(texts["ensemble"]):
            after = {ARMS[name][1]: texts[name][i]["after"] for name in ARMS}
            # show the plain prompt, not the chat template around it
            plain = max((prompt for prompt in prompts if prompt in pair["prompt"]), key=len, default=pair["prompt"])
            samples.append({"prompt": plain, "before": pair["before"], "after": after})
    return {
        "trained": [title for _, title, _ in ARMS.values()],
        "block": block_length(ppo["steps"]),
        "table": table_rows(ppo),
        "findings": ppo["findings"],
        "rows": {ARMS[name][1]: read_metrics(folder / "ppo" / name) for name in ARMS},
        "samples": samples,
    }
