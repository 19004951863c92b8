"""PPO in the demo: one short run on the single head and one on its price on distance; both policies judged afterwards.

The two runs differ only in the reward: they have the same language model, prompts (on which no reward head was trained)
and random numbers, so their first step has the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..evaluation.statistics import Interval, mean_interval
from ..job.files import atomic_write_text
from ..job.log import read_metrics
from ..models.adapter import peft_hushed
from ..models.loading import load_language_model, load_tokenizer
from ..ppo.config import KLConfig, PolicyConfig, PPOConfig, RewardConfig, UpdateConfig
from ..ppo.loop import run_ppo
from ..ppo.watch.findings import by_step, ends, series
from ..report.words import signed, verdict
from ..sampling.config import RolloutConfig
from ..sampling.read_texts import read_texts
from ..sampling.stored import Request, Rollout, sample
from ..sampling.tokens import Sampling
from .candidates import CHUNK, SPREAD, Policies
from .config import DemoPPOConfig
from .judges import Judge, tensor_of
from .rewards import SINGLE, TITLES, TRUST, Fitted, distance

ARMS = {"single": SINGLE, "trust": TRUST}  # folder of a run under ppo/ -> its reward

_JUDGE = '''"""The judge of this demo as a gold scorer of `prudent ppo`: its key gold names this file and function."""

import json
from pathlib import Path

from prudent.rlhf.data.careful import Careful

folder = Path(__file__).resolve().parent
held_out = set((folder / "prompts.txt").read_text(encoding="utf-8").split("\\n"))
lines = (folder.parent / "samples.jsonl").read_text(encoding="utf-8").rstrip("\\n").split("\\n")
training = [row for row in map(json.loads, lines) if row["prompt"] not in held_out]
judge = Careful([row["prompt"] for row in training], [row["responses"] for row in training])


def gold(prompts, responses):
    return [judge(prompt, [response])[0] for prompt, response in zip(prompts, responses)]
'''


class Start(NamedTuple):
    """The language model of both runs (folder or hub name), and how it is loaded and sampled."""

    model: str
    dtype: Literal["float32", "bfloat16"]
    sampling: Sampling
    seed: int
    batch_rows: int


def arm_config(name: str, ppo: DemoPPOConfig, start: Start, folder: Path, price: float) -> PPOConfig:
    """The config of the PPO run `name` (a key of ARMS) in the demo's folder."""
    return PPOConfig(
        model=start.model,
        prompts=str(folder / "ppo" / "prompts.txt"),
        output=folder / "ppo" / name,
        reward=RewardConfig(
            # the model's own price is trust:price
            source=str(folder / "model"),
            aggregation=f"trust:{price if ARMS[name] == TRUST else 0:g}",
        ),
        steps=ppo.steps,
        seed=start.seed,
        dtype=start.dtype,
        policy=PolicyConfig(lora_rank=ppo.lora_rank, lora_alpha=2 * ppo.lora_rank),
        rollout=RolloutConfig(
            prompts_per_step=ppo.prompts_per_step,
            samples_per_prompt=ppo.samples_per_prompt,
            max_new_tokens=ppo.max_new_tokens,
            temperature=start.sampling.temperature,
        ),
        kl=KLConfig(coef=ppo.kl_coef),
        update=UpdateConfig(estimator="rloo", epochs=1, lr=ppo.lr),
        gold=f"{folder / 'ppo' / 'judge.py'}:gold",
        save_every=max(1, ppo.steps // 4),
        sample_every=max(1, ppo.steps),
    )


def run_arms(
    ppo: DemoPPOConfig,
    start: Start,
    folder: Path,
    prompts: Sequence[str],
    price: float,
    taps: Sequence[str],
    progress: bool,
) -> Policies:
    """Run or resume both PPO runs, in ppo/single and ppo/trust of the demo's folder, and sample their policies.

    prompts: held-out prompts, on which no head was trained.
    """
    atomic_write_text(folder / "ppo" / "prompts.txt", "".join(prompt + "\n" for prompt in prompts))
    atomic_write_text(folder / "ppo" / "judge.py", _JUDGE)
    ppo = ppo.model_copy(update={"prompts_per_step": min(ppo.prompts_per_step, len(prompts))})
    for name in ARMS:
        run_ppo(arm_config(name, ppo, start, folder, price), resume=True, progress=progress)
    sampled = {name: _sample(folder / "ppo" / name, ppo, start, prompts, progress) for name in ARMS}
    model, tokenizer = _load(start), load_tokenizer("model", start.model)
    policies = {}
    for name, found in sampled.items():
        texts = [(rollout.prompt, text) for rollout in found for text in rollout.responses]
        read = read_texts(
            model, tokenizer, texts, taps, folder / "ppo" / name / "judged" / "read", chunk=CHUNK, progress=progress
        )
        parts = read.split([len(rollout.responses) for rollout in found])
        policies[ARMS[name]] = [rollout._replace(features=part) for rollout, part in zip(found, parts, strict=True)]
    return policies


def _load(start: Start) -> Any:
    model = load_language_model("model", start.model, getattr(torch, start.dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _sample(folder: Path, ppo: DemoPPOConfig, start: Start, prompts: Sequence[str], progress: bool) -> list[Rollout]:
    """Responses of the policy that a run has trained, sampled as the language model's own."""
    from peft import PeftModel

    with peft_hushed():
        policy = PeftModel.from_pretrained(_load(start), str(folder / "policy")).merge_and_unload()
    requests = [Request(prompt, ppo.judged) for prompt in prompts]
    tokenizer = load_tokenizer("model", start.model)
    return sample(
        policy,
        tokenizer,
        requests,
        folder / "judged",
        start.sampling,
        seed=start.seed + 1,
        batch_rows=start.batch_rows,
        spread=SPREAD,
        progress=progress,
    )


def as_dict(policies: Policies, own_gold: Tensor, judge: Judge, fitted: Fitted, folder: Path) -> dict[str, Any]:
    """{"arms": run -> gold, its change, proxy, KL and distances; "difference": of gold, trust less single; "findings"}.

    own_gold: [P, N] of the language model's own responses.   fitted: the rewards that the runs were trained on.
    """
    before, gold = own_gold.mean(dim=1), {}
    found: dict[str, Any] = {"before": float(before.mean()), "arms": {}}
    for name, reward in ARMS.items():
        rollouts = policies[reward]
        gold[name] = torch.stack([tensor_of(judge, r.prompt, r.responses) for r in rollouts]).mean(dim=1)
        features = torch.cat([rollout.features for rollout in rollouts])
        far = distance(fitted, features)
        steps = by_step(read_metrics(folder / "ppo" / name))
        kl = ends(series(steps, "kl/sequence"))
        found["steps"], found["responses"] = len(steps), len(features)
        found["arms"][name] = {
            "title": TITLES[reward],
            "gold": float(gold[name].mean()),
            "change": _row(mean_interval(gold[name] - before, resamples=2000)),
            "proxy": float(fitted.single(features.float(), aggregation="mean").reward.detach().mean()),
            "distance": float(far.median()),
            "beyond": float((far > 1).double().mean()),
            "kl": None if kl is None else kl[1],
        }
    found["difference"] = _row(mean_interval(gold["trust"] - gold["single"], resamples=2000))
    return found | {"findings": findings(found)}


def _row(difference: Interval) -> dict[str, Any]:
    return {**difference._asdict(), "verdict": verdict(difference, "more", "less", "no difference shown")}


def findings(ppo: Mapping[str, Any]) -> list[str]:
    """What the intervals say: the two policies against each other, then each against the language model."""
    title, other = TITLES[TRUST], TITLES[SINGLE]
    apart = ppo["difference"]
    shown = signed((apart["value"], apart["low"], apart["high"]), 2)
    if apart["verdict"] == "no difference shown":
        both = f"the policies trained on the {title} and on the {other}"
        lines = [f"PPO: no difference in gold reward is shown between {both} ({shown})."]
    else:
        verb = f"PPO: the policy trained on the {title} has {apart['verdict']} gold reward than that on the {other}"
        lines = [f"{verb} ({shown})."]
    lines[0] += " One seed is one observation."
    for arm in ppo["arms"].values():
        change = arm["change"]
        moved = {"more": "raised", "less": "lowered"}.get(change["verdict"], "is not shown to have changed")
        shown = signed((change["value"], change["low"], change["high"]), 2)
        far = f"{100 * arm['beyond']:.0f} % of its responses lie beyond distance 1"
        lines.append(f"PPO on the {arm['title']} {moved} the gold reward ({shown}); {far}.")
    return lines


def table_rows(ppo: Mapping[str, Any]) -> list[list[str]]:
    """A head row, the language model, and one row per run, as text."""
    lines = [["policy", "gold", "change, 95 % interval", TITLES[SINGLE], "distance", "beyond 1, %", "KL, nats"]]
    lines.append(["the language model", f"{ppo['before']:+.3f}", "", "", "", "", ""])
    for arm in ppo["arms"].values():
        change = arm["change"]
        lines.append(
            [
                f"PPO on the {arm['title']}",
                f"{arm['gold']:+.3f}",
                signed((change["value"], change["low"], change["high"]), 2),
                f"{arm['proxy']:+.2f}",
                f"{arm['distance']:.2f}",
                f"{100 * arm['beyond']:.0f}",
                "-" if arm["kl"] is None else f"{arm['kl']:.1f}",
            ]
        )
    return lines


def samples(policies: Policies, own: Sequence[Rollout], fitted: Fitted, count: int = 4) -> list[dict[str, Any]]:
    """The first response of the language model and of each policy to the first prompts, with its distance."""
    found = []
    for p in range(min(count, len(own))):
        sides = {"before": own[p]} | {f"PPO on the {TITLES[name]}": rollouts[p] for name, rollouts in policies.items()}
        rows = [
            {"who": who, "response": side.responses[0], "distance": float(distance(fitted, side.features[:1])[0])}
            for who, side in sides.items()
        ]
        found.append({"prompt": str(own[p].prompt), "rows": rows})
    return found
