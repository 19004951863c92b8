"""Compare reward models by best-of-n on the same samples: their picks, and the picks' gold scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.best_of_n import best_of_n_curve, powers_of_two
from ..evaluation.statistics import mean_interval
from ..job.files import atomic_write_json, atomic_write_text, read_json
from ..models.features import compute_features
from ..models.loading import load_language_model, load_reward, load_tokenizer
from ..report.words import aligned, count, signed
from ..sampling.prompts import Prompt, check_prompts, load_prompts, longest_prompt, prompt_order, reward_readers
from ..sampling.stored import Request, Rollout, sample
from ..sampling.tokens import Sampling
from ..sampling.turn import Turn
from .batch import Samples
from .config import PPOConfig
from .rewards.open import open_gold
from .rewards.sources import RewardSource, Texts

_SEED = 1  # added to the run's seed, so that equal prompts do not get the samples that PET was trained on


class Source(NamedTuple):
    """The policy before training, its prompts, and the gold scorer."""

    model: Any
    tokenizer: Any
    turn: Turn
    prompts: list[Prompt]
    gold: RewardSource | None


@dataclass(frozen=True)
class BestOf:
    """metrics: the content of best_of_n.json."""

    metrics: dict[str, Any]

    def __str__(self) -> str:
        m = self.metrics
        rows = [[f"best of {m['n'][-1]}, {count(m['prompts'], 'prompt')}: picked by", "words", "same pick as PET"]]
        rows[0] += [] if m["gold"] is None else ["gold", "PET minus it"]
        for name, found in m["rewards"].items():
            gap = m["difference"].get(name)
            cells = [f"{found['words']:.1f}", f"{found['same_as_pet']:.0%}" if name in m["difference"] else ""]
            if m["gold"] is not None:
                difference = "" if gap is None else signed((gap["value"], gap["low"], gap["high"]), 3)
                cells += [f"{found['gold'][-1]:+.3f}", difference]
            rows.append([name, *cells])
        if m["gold"] is not None:
            rows += [["chance", "", "", f"{m['any']:+.3f}", ""], ["gold", "", "", f"{m['oracle'][-1]:+.3f}", ""]]
        return aligned(rows)


def prepare(config: PPOConfig, progress: bool) -> Source:
    """Load the policy's model, prompts and gold scorer. Raises ValueError for any that PPO would refuse.

    The model stays on the CPU until it samples: training the reward, which comes first, needs the device's memory.
    """
    check_prompts(config.prompts)
    tokenizer = load_tokenizer("model", config.model)
    own = "bfloat16" if torch.cuda.is_available() else "float32"  # the dtype in which PPO samples
    dtype = getattr(torch, own if config.dtype == "auto" else config.dtype)
    model = load_language_model("model", config.model, dtype).eval()
    turn = Turn(tokenizer, model)
    limit = longest_prompt(config.rollout, model.config, turn)
    prompts = load_prompts(
        config.prompts,
        turn,
        limit,
        readers=reward_readers("pet.start", None if config.pet.start in ("bt", "brme") else config.pet.start),
        skip_bad_rows=config.skip_bad_rows,
        progress=progress,
    ).prompts
    prompt_order(len(prompts), 0, config.rollout.prompts_per_step, config.seed)  # refuses too few
    used = prompts[: config.best_of_prompts]
    gold = None if config.gold is None else open_gold(config.gold, Texts(tokenizer, used))
    if gold is not None:  # a user's code: try it now, with a prompt as its own response
        gold(Samples([used[0].ids], [used[0].ids], [False], [0]))
    return Source(model, tokenizer, turn, used, gold)


def compare_best_of_n(
    config: PPOConfig, source: Source, rewards: Mapping[str, Path | str], device: torch.device, progress: bool
) -> BestOf:
    """Sample n = pet.samples responses to each prompt from the untrained policy, and let each reward pick one.

    rewards: name -> folder of an EnsembleRewardModel with its tokeniser; the last is PET's.
    """
    done = config.output / "best_of_n.json"
    if done.exists() and (known := read_json(done)).get("gold") == config.gold:  # gold may change on resume
        return BestOf(known)
    n, folder, rollout = config.pet.samples, config.output / "best_of_n", config.rollout
    sampling = Sampling(
        rollout.max_new_tokens, rollout.temperature, rollout.top_k or len(source.tokenizer), rollout.top_p
    )
    rollouts = sample(
        source.model.to(device),
        source.tokenizer,
        [Request(prompt.item, n) for prompt in source.prompts],
        folder,
        sampling,
        seed=config.seed + _SEED,
        batch_rows=rollout.batch_rows,
        progress=progress,
    )
    proxies = {name: _scored(model, rollouts, folder, device, progress) for name, model in rewards.items()}
    gold = None if source.gold is None else _gold(source, rollouts)
    metrics = _metrics(proxies, gold, rollouts)
    metrics["gold"] = config.gold
    picks = {name: proxy.argmax(dim=1).tolist() for name, proxy in proxies.items()}
    lines = []
    for row, drawn in enumerate(rollouts):
        texts = {
            name: {
                "response": drawn.responses[pick[row]],
                "gold": None if gold is None else float(gold[row, pick[row]]),
            }
            for name, pick in picks.items()
        }
        lines.append(json.dumps({"prompt": drawn.prompt, **texts}, ensure_ascii=False) + "\n")
    atomic_write_text(config.output / "best_of_n.jsonl", "".join(lines))
    atomic_write_json(done, metrics)
    return BestOf(metrics)


def _scored(name: Path | str, rollouts: list[Rollout], folder: Path, device: torch.device, progress: bool) -> Tensor:
    """[P, n] rewards; two reward models on one trunk compute its features once."""
    scorer = load_reward("reward", str(name)).scorer()
    items = [{"prompt": r.prompt, "response": text} for r in rollouts for text in r.responses]
    features = compute_features(scorer, items, folder / "scored", progress).features
    with torch.no_grad():
        reward: Tensor = scorer.model.score(features.to(device), centre="none").reward
    return reward.view(len(rollouts), -1).cpu()


def _gold(source: Source, rollouts: list[Rollout]) -> Tensor:
    """[P, n] gold scores; a response that the scorer fails on gets the lowest score, so that gold never picks it."""
    prompts, responses, index = [], [], []
    for row, (prompt, drawn) in enumerate(zip(source.prompts, rollouts, strict=True)):
        for text in drawn.responses:
            whole = source.turn.whole(prompt.item, text)
            prompts.append(prompt.ids)
            responses.append(whole[len(prompt.ids) :])
            index.append(row)
    assert source.gold is not None
    texts = [text for drawn in rollouts for text in drawn.responses]
    reward = source.gold(Samples(prompts, responses, [True] * len(index), index, texts)).reward
    bad = reward.isnan()
    if bool(bad.all()):
        raise ValueError("gold: expected a number for some response, got none")
    return torch.where(bad, reward[~bad].min(), reward).view(len(rollouts), -1)


def _metrics(proxies: dict[str, Tensor], gold: Tensor | None, rollouts: list[Rollout]) -> dict[str, Any]:
    """Curves over n in powers of 2 (unbiased, over every subset of n), and the picks from all."""
    ns = powers_of_two(next(iter(proxies.values())).shape[1])
    picks = {name: proxy.argmax(dim=1) for name, proxy in proxies.items()}
    words = torch.tensor([[float(len(text.split())) for text in r.responses] for r in rollouts])
    last = list(proxies)[-1]
    curves = {} if gold is None else {name: best_of_n_curve(proxy, gold, ns) for name, proxy in proxies.items()}
    result: dict[str, Any] = {"prompts": len(rollouts), "n": ns, "rewards": {}, "difference": {}}
    for name, proxy in proxies.items():
        result["rewards"][name] = {
            "proxy": best_of_n_curve(proxy, proxy, ns).proxy.tolist(),
            "gold": curves[name].gold.tolist() if curves else None,
            "words": float(words.gather(1, picks[name][:, None]).mean()),
            "same_as_pet": float((picks[name] == picks[last]).double().mean()),
        }
        if name != last:
            gap = curves[last].gold_per_prompt[:, -1] - curves[name].gold_per_prompt[:, -1] if curves else None
            result["difference"][name] = None if gap is None else mean_interval(gap)._asdict()
    if gold is not None:
        result["any"] = float(gold.mean())
        result["oracle"] = best_of_n_curve(gold, gold, ns).gold.tolist()
    return result
