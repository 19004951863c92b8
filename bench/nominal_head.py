"""Compare the accuracy of BRME's nominal head with that of a single Bradley-Terry head (the paper's table 5).

    python -m prudent.bench.nominal_head --model DIR|smollm2 [...] --data PAIRS.jsonl [...] --cache DIR --output DIR

For every model, data set and seed: split by prompt, train stage 1 (Bradley-Terry, one head) and stage 2 (BRME, K heads)
on the frozen trunk's features, and measure accuracy on the held-out pairs. The seed changes the split, the initial
weights, the order of the pairs and their assignment to heads. Writes nominal_head.json (every number) and
nominal_head.md (the table).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from ..engine import EnsembleHead, EnsembleRewardModel, Scorer
from ..kernels import Aggregation, nominal_reward
from ..rlhf.data.pairs import PreferencePair, load_pairs, split_by_prompt
from ..rlhf.evaluation.statistics import accuracy_difference, group_labels, pair_accuracy
from ..rlhf.job.files import atomic_write_json, atomic_write_text
from ..rlhf.models.embedded import embedded_model
from ..rlhf.models.features import compute_features
from ..rlhf.reward.config import BradleyTerryConfig, BRMEConfig
from ..rlhf.reward.fit import PairFeatures
from ..rlhf.reward.two_stage import fit_two_stages

SCORERS = (
    "single",
    "nominal",
    "nominal, relative std",
    "one head, the first",
    "mean of heads",
    "worst",
    "tradeoff:0.4",
    "longer answer",
)
Sides = tuple[Tensor, Tensor]


class Study:
    """One model's features of one data set; `run` trains and scores heads on them for one seed."""

    def __init__(
        self, pairs: list[PreferencePair], features: dict[tuple[str, str], Tensor], heads: int, held_out: float
    ):
        self.pairs, self.features, self.heads, self.held_out = pairs, features, heads, held_out

    def sides(self, pairs: list[PreferencePair]) -> Sides:
        chosen = torch.stack([self.features[_key(p, "chosen")] for p in pairs])
        rejected = torch.stack([self.features[_key(p, "rejected")] for p in pairs])
        return chosen, rejected

    def run(self, seed: int) -> tuple[list[str], dict[str, Sides]]:
        """The held-out prompts, and the (chosen, rejected) rewards of every scorer on their pairs."""
        train, held_out = split_by_prompt(self.pairs, self.held_out, seed)
        x = self.sides(train)
        configs = BradleyTerryConfig(solver="adamw"), BRMEConfig(num_heads=self.heads)
        prompts = group_labels(pair.prompt_key for pair in train)
        single, ensemble = fit_two_stages(PairFeatures(*x, prompts=prompts), *configs, seed=seed, progress=False)
        _typical_std(ensemble, torch.cat(x))
        rewards = [head_rewards(single, side, ensemble, side) for side in self.sides(held_out)]
        sides = {name: (rewards[0][name], rewards[1][name]) for name in rewards[0]}
        return [p.prompt_key for p in held_out], {**sides, "longer answer": answer_lengths(held_out)}


def answer_lengths(pairs: list[PreferencePair]) -> Sides:
    """Characters of the chosen and of the rejected answers."""
    chosen, rejected = ([float(len(str(getattr(p, side)))) for p in pairs] for side in ("chosen", "rejected"))
    return torch.tensor(chosen), torch.tensor(rejected)


def _key(pair: PreferencePair, side: str) -> tuple[str, str]:
    return pair.prompt_key, json.dumps(getattr(pair, side), ensure_ascii=False)


@torch.no_grad()
def _typical_std(head: EnsembleHead, features: Tensor) -> None:
    head.std_ref.copy_(head(features).std.mean(dim=0))


@torch.no_grad()
def head_rewards(
    single: EnsembleHead, single_features: Tensor, ensemble: EnsembleHead, features: Tensor
) -> dict[str, Tensor]:
    """Name -> rewards [P], for every scorer but the longer answer; each head reads the features of its own trunk."""
    out = ensemble(features, aggregation="tradeoff:0.4")
    relative = Aggregation("nominal", nominal="relative_std")
    return {
        "single": single(single_features).reward,
        "nominal": nominal_reward(out.mean, out.std, Aggregation("nominal")),
        "nominal, relative std": nominal_reward(out.mean, out.std, relative, ensemble.std_ref),
        "one head, the first": out.mean[:, 0],
        "mean of heads": out.mean.mean(dim=1),
        "worst": out.mean.min(dim=1).values,
        "tradeoff:0.4": out.reward,
    }


def study_features(scorer: Scorer, pairs: list[PreferencePair], folder: Path) -> dict[tuple[str, str], Tensor]:
    """Features of each distinct (prompt, response), cached in `folder`."""
    items: dict[tuple[str, str], dict[str, Any]] = {}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            items.setdefault(_key(pair, side), {"prompt": pair.prompt, "response": getattr(pair, side)})
    return dict(zip(items, compute_features(scorer, list(items.values()), folder).features, strict=True))


def summarise(runs: list[tuple[list[str], dict[str, Sides]]]) -> dict[str, Any]:
    """Accuracies on the held-out pairs of all seeds together, with intervals that resample prompts.

    The resampling unit is the prompt, because a prompt's pairs depend on each other, within and across seeds.
    """
    groups = group_labels(prompt for prompts, _ in runs for prompt in prompts)
    pooled = {n: tuple(torch.cat([sides[n][i] for _, sides in runs]) for i in (0, 1)) for n in SCORERS}
    single = (pooled["single"][0], pooled["single"][1])
    rows = {}
    for name in SCORERS:
        sides = (pooled[name][0], pooled[name][1])
        rows[name] = {
            "accuracy": pair_accuracy(*sides, groups)._asdict(),
            "minus_single": accuracy_difference(sides, single, groups)._asdict(),
            "by_seed": [float((s[name][0] > s[name][1]).double().mean()) for _, s in runs],
        }
    return {
        "held_out_pairs": [len(prompts) for prompts, _ in runs],
        "held_out_prompts": len(groups.unique()),
        "rows": rows,
    }


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        pairs, prompts = result["held_out_pairs"], result["held_out_prompts"]
        yield f"\n### {result['model']} on {result['data']}\n"
        yield f"{len(pairs)} seeds, {sum(pairs)} held-out pairs of {prompts} prompts in all.\n"
        yield "| scorer | accuracy | 95 % | by seed | minus single | 95 % |\n|---|---|---|---|---|---|"
        for name, row in result["rows"].items():
            a, d = row["accuracy"], row["minus_single"]
            seeds = " ".join(f"{v:.3f}" for v in row["by_seed"])
            gap = ["", ""] if name == "single" else [f"{d['value']:+.3f}", f"[{d['low']:+.3f}, {d['high']:+.3f}]"]
            yield f"| {name} | {a['value']:.3f} | [{a['low']:.3f}, {a['high']:.3f}] | {seeds} | {gap[0]} | {gap[1]} |"


def verdict(results: list[dict[str, Any]]) -> Iterator[str]:
    """One sentence per data set: whether the interval of nominal minus single excludes 0."""
    for result in results:
        d = result["rows"]["nominal"]["minus_single"]
        if d["low"] > 0:
            says = "the nominal head is more accurate than the single head"
        elif d["high"] < 0:
            says = "the nominal head is LESS accurate than the single head: the claim fails here"
        else:
            says = "no difference between the two that this many prompts can show"
        gap = f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        yield f"- {result['model']}, {result['data']}: nominal minus single {gap}: {says}."


def _report(results: list[dict[str, Any]], command: str, heads: int) -> str:
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    about = f"""# The nominal head against a single head on real preferences

BRME (arXiv 2409.15360, table 5) reports 75.6 % pair accuracy for the nominal head (least predicted std) and 74.5 % for
a single Bradley-Terry head, in 8B models trained whole. Here: a frozen trunk, heads on the features of the last token,
pairs split by prompt. Each BRME head trains on 1/{heads} of the pairs, as in the paper, the single head on all of them,
and a frozen trunk gives the heads nothing else in common. Intervals: percentile bootstrap over prompts, all seeds'
held-out pairs together. `smollm2` is the model of `prudent demo`.

    {command}

{time.strftime("%Y-%m-%d")}, {machine}.

## What came out
"""
    return "\n".join([about, *verdict(results), "\n## Tables", *table(results), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="local folder, hub name or smollm2; repeatable")
    parser.add_argument("--data", action="append", required=True, help="file of preference pairs; repeat for several")
    parser.add_argument("--output", type=Path, required=True, help="folder for nominal_head.json and nominal_head.md")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the features, which later runs reuse")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default %(default)s)")
    parser.add_argument("--heads", type=int, default=5, help="K (default %(default)s)")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of prompts held out (default %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens; longer texts lose their start (default %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the trunk (default %(default)s)")
    args = parser.parse_args()
    results = []
    for model_name in args.model:
        source = str(embedded_model()) if model_name == "smollm2" else model_name
        model = EnsembleRewardModel.from_trunk(source, dtype=getattr(torch, args.dtype))
        scorer = Scorer(
            model,
            AutoTokenizer.from_pretrained(source, trust_remote_code=False),
            max_length=args.max_length,
            progress=False,
        )
        for data in args.data:
            pairs = load_pairs(data).pairs
            folder = args.cache / Path(model_name).name / Path(data).stem
            study = Study(pairs, study_features(scorer, pairs, folder), args.heads, args.held_out)
            label = f"{Path(model_name).name}, {Path(data).stem}"
            runs = [study.run(seed) for seed in tqdm(range(args.seeds), desc=label, unit="seed")]
            results.append({"model": Path(model_name).name, "data": Path(data).stem, **summarise(runs)})
    names = [f"--model {Path(m).name}" for m in args.model] + [f"--data {Path(d).name}" for d in args.data]
    command = f"python -m prudent.bench.nominal_head {' '.join(names)} --seeds {args.seeds} --cache CACHE --output OUT"
    args.output.mkdir(parents=True, exist_ok=True)
    atomic_write_json(args.output / "nominal_head.json", {"command": command, "results": results})
    atomic_write_text(args.output / "nominal_head.md", _report(results, command, args.heads))
    print("\n".join(verdict(results)))


if __name__ == "__main__":
    main()
