"""Compare the exact fit of a Bradley-Terry head with AdamW's on human preferences, and time it.

    python -m prudent.bench.fit --model DIR|smollm2 [...] --data PAIRS.jsonl[:ROWS] [...] --cache DIR --output DIR
    python -m prudent.bench.fit --seconds --output DIR

For every model, data set, number of pairs and seed: split by prompt, draw the pairs, fit one head on the frozen trunk's
features by AdamW (`fit_heads` with its defaults) and exactly (`fit_ridge` with its defaults), and measure log-loss and
accuracy on the pairs of the held-out prompts. The seed changes the split, the pairs drawn, AdamW's start and order, and
the folds. A later call for other models or data adds to the results in the folder. `--seconds` times the exact fit on
made pairs instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from ..engine import EnsembleHead, EnsembleRewardModel, Scorer
from ..engine.likelihood import special_ids
from ..rlhf.data.pairs import PreferencePair, load_pairs, split_by_prompt
from ..rlhf.evaluation.statistics import Interval, group_labels
from ..rlhf.job.files import atomic_write_json, atomic_write_text, read_json
from ..rlhf.models.embedded import embedded_model
from ..rlhf.report.words import markdown_table, signed
from ..rlhf.reward.config import BradleyTerryConfig
from ..rlhf.reward.convex import fit_ridge
from ..rlhf.reward.fit import fit_heads
from . import machine
from .nominal_head import Study, study_features

RESAMPLES = 2000
MADE = ((20_000, 576), (20_000, 4096), (300, 4096))  # pairs x features of --seconds


class Measured(NamedTuple):
    """On P held-out pairs: log-loss and correctness [P] of AdamW's and of the exact head; the l2 that was chosen."""

    prompts: list[str]
    loss: tuple[Tensor, Tensor]
    correct: tuple[Tensor, Tensor]
    l2: float


def measure(study: Study, pairs: int, seed: int) -> Measured | None:
    """One seed with `pairs` training pairs; None if there are fewer."""
    parts = drawn(study, pairs, seed)
    if parts is None:
        return None
    train, held_out = parts
    sides, prompts = study.sides(train), group_labels(pair.prompt_key for pair in train)
    shipped = fit_heads(*sides, BradleyTerryConfig(solver="adamw", seed=seed), progress=False).head
    exact = fit_ridge(*sides, prompts, seed=seed)
    loss, correct = zip(*(scored(head, study.sides(held_out)) for head in (shipped, exact.head)), strict=True)
    return Measured([p.prompt_key for p in held_out], loss, correct, exact.l2)


def drawn(study: Study, pairs: int, seed: int) -> tuple[list[PreferencePair], list[PreferencePair]] | None:
    """`pairs` training pairs and the pairs of the held-out prompts, of one seed; None if there are fewer."""
    train, held_out = split_by_prompt(study.pairs, study.held_out, seed)
    if len(train) < pairs:
        return None
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:pairs]
    return [train[i] for i in order.tolist()], held_out


@torch.no_grad()
def scored(head: EnsembleHead, sides: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The log-loss, and 1 or 0 for right or wrong, of each pair [P] of features (chosen, rejected) [P, D]."""
    chosen, rejected = (head(side).reward.double() for side in sides)
    return F.softplus(rejected - chosen), (chosen > rejected).double()


def interval(values: Tensor, seeds: Tensor, prompts: Tensor) -> Interval:
    """The mean of values [P] with its percentile bootstrap interval over seeds and, crossed with them, prompts [P]."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(RESAMPLES):
        weight = torch.ones(len(values), dtype=torch.float64)
        for label in (seeds, prompts):
            groups = int(label.max()) + 1
            counts = torch.bincount(torch.randint(groups, (groups,), generator=generator), minlength=groups)
            weight = weight * counts[label]
        drawn.append(float((weight * values).sum() / weight.sum()))
    kept = torch.tensor(drawn, dtype=torch.float64)
    low, high = torch.quantile(kept[kept.isfinite()], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def pooled(prompts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Of the prompts of each seed's held-out pairs: the labels [P] of seeds and of prompts over all, and the counts."""
    labels = group_labels(prompt for one in prompts for prompt in one)
    seeds = torch.cat([torch.full((len(one),), i) for i, one in enumerate(prompts)])
    counts = {"seeds": len(prompts), "held_out_pairs": len(labels), "held_out_prompts": len(labels.unique())}
    return seeds, labels, counts


def summarise(runs: Sequence[Measured]) -> dict[str, Any]:
    """Both heads' means over all seeds' held-out pairs, and exact minus AdamW with its interval."""
    seeds, prompts, counts = pooled([run.prompts for run in runs])
    result: dict[str, Any] = {**counts, "l2": [run.l2 for run in runs]}
    for name in ("loss", "correct"):
        shipped, exact = (torch.cat([getattr(run, name)[i] for run in runs]) for i in (0, 1))
        result[name] = {
            "adamw": float(shipped.mean()),
            "exact": float(exact.mean()),
            "difference": interval(exact - shipped, seeds, prompts)._asdict(),
            "by_seed": [float(getattr(run, name)[1].mean() - getattr(run, name)[0].mean()) for run in runs],
        }
    return result


def seconds(shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Time `fit_ridge` on made pairs: a linear truth, logistic noise, features of many scales, 40 pairs a prompt."""
    rows = []
    for pairs, width in shapes:
        g = torch.Generator().manual_seed(0)
        sides = [torch.randn(pairs, width, generator=g) for _ in range(2)]
        logit = (sides[0] - sides[1]) @ torch.randn(width, generator=g) / width**0.5
        flip = (torch.rand(pairs, generator=g) > torch.sigmoid(logit))[:, None]
        scale = torch.logspace(-1, 1, width)
        chosen, rejected = (torch.where(flip, a, b).mul_(scale).bfloat16() for a, b in (sides[::-1], sides))
        wall, cpu = time.perf_counter(), time.process_time()
        fit = fit_ridge(chosen, rejected, torch.arange(pairs) // 40)
        spent = time.perf_counter() - wall, time.process_time() - cpu
        rows.append(
            {"pairs": pairs, "features": width, "clock": spent[0], "processor": spent[1], "values": len(fit.curve)}
        )
    return rows


def _results(results: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["model", "data", "pairs"]]
    rows[0] += ["log-loss, AdamW", "exact", "exact minus AdamW", "accuracy, AdamW", "exact", "exact minus AdamW", "L2"]
    for row in results:
        loss, correct = row["loss"], row["correct"]
        gaps = [signed(tuple(part["difference"].values()), 3) for part in (loss, correct)]
        l2 = " ".join(f"{value:g}" for value in row["l2"])
        cells = [f"{loss['adamw']:.3f}", f"{loss['exact']:.3f}", gaps[0]]
        cells += [f"{correct['adamw']:.3f}", f"{correct['exact']:.3f}", gaps[1]]
        rows.append([row["model"], row["data"], str(row["pairs"]), *cells, l2])
    return markdown_table(rows)


def _verdict(results: Sequence[dict[str, Any]]) -> str:
    """One sentence: in how many settings the exact fit is better, worse or neither, by the intervals."""
    parts = []
    for name, part, sign in (("log-loss", "loss", -1), ("accuracy", "correct", 1)):
        gaps = [row[part]["difference"] for row in results]
        better = sum((gap["high"] < 0) if sign < 0 else (gap["low"] > 0) for gap in gaps)
        worse = sum((gap["low"] > 0) if sign < 0 else (gap["high"] < 0) for gap in gaps)
        word = "lower" if sign < 0 else "higher"
        parts.append(f"its {name} is {word} beyond the interval in {better} of {len(gaps)} settings, worse in {worse}")
    return f"The exact fit against AdamW: {'; '.join(parts)}."


def page(found: dict[str, Any]) -> str:
    """fit.md."""
    text = ["# The exact fit of a Bradley-Terry head against AdamW's", ""]
    if found.get("results"):
        results = found["results"]
        text += [
            _verdict(results),
            "",
            "Human preference pairs, split by prompt; a frozen trunk's last-token features; the same pairs for both.",
            f"Means over the held-out pairs of {results[0]['seeds']} seeds. In brackets: 95 % intervals of the paired",
            "difference, from resampling seeds and prompts. L2: the penalty chosen in each seed.",
            "",
            *(f"    {command}" for command in found["commands"]),
            "",
            *_results(results),
            "",
        ]
    if found.get("seconds"):
        here = found["machine"]
        text += [
            "## Seconds",
            "",
            f"`python -m prudent.bench.fit --seconds`: folds, grid and refit on made bfloat16 pairs. {here['name']}, "
            f"{here['threads']} threads,",
            f"commit {here['commit'][:12]}, {here['date']}; processor: seconds of all threads.",
            "",
            "| pairs x features | seconds | processor | penalties |",
            "|---|---|---|---|",
            *(
                f"| {r['pairs']} x {r['features']} | {r['clock']:.1f} | {r['processor']:.1f} | {r['values']} |"
                for r in found["seconds"]
            ),
            "",
        ]
    return "\n".join(text)


def run(
    args: argparse.Namespace,
    measure: Callable[[Study, int, int], Any],
    summarise: Callable[[list[Any]], dict[str, Any]],
    taps: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """`summarise` what `measure` gave for the seeds, for every model, data set and number of pairs.

    Sizes of which a seed has too few pairs are left out. taps: what is read of the trunk, see `EnsembleRewardConfig`.
    """
    results = []
    for model_name in args.model:
        source = str(embedded_model()) if model_name == "smollm2" else model_name
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        options: dict[str, Any] = {"taps": taps, "logprob_skips": special_ids(tokenizer)}
        model = EnsembleRewardModel.from_trunk(source, dtype=getattr(torch, args.dtype), **options)
        scorer = Scorer(model, tokenizer, max_length=args.max_length, progress=False)
        for data in args.data:
            file, _, rows = data.partition(":")
            pairs: list[PreferencePair] = load_pairs(file, limit=int(rows) if rows else None).pairs
            name = {"model": Path(model_name).name, "data": Path(file).stem}
            folder = args.cache / name["model"] / name["data"]
            study = Study(pairs, study_features(scorer, pairs, folder), 1, args.held_out)
            for size in args.pairs:
                bar = tqdm(range(args.seeds), desc=f"{name['model']}, {name['data']}, {size} pairs", unit="seed")
                runs = [found for seed in bar if (found := measure(study, size, seed)) is not None]
                if len(runs) == args.seeds:
                    results.append({**name, "pairs": size, **summarise(runs)})
    return results


def options(description: str | None, sizes: Sequence[int]) -> argparse.ArgumentParser:
    """The command line of a comparison on human preferences; `sizes`: the default numbers of training pairs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="local folder, hub name or smollm2; repeatable")
    parser.add_argument(
        "--data", action="append", default=[], help="file of pairs, with :N for its first N rows; repeatable"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the .json and .md of the results")
    parser.add_argument("--cache", type=Path, help="folder for the features, which later runs reuse")
    parser.add_argument("--pairs", type=int, nargs="+", default=list(sizes), help="training pairs")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default %(default)s)")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of prompts held out (default %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=256, help="tokens; longer texts lose their start (default %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the trunk (default %(default)s)")
    return parser


def add_up(found: dict[str, Any], new: list[dict[str, Any]], args: argparse.Namespace, module: str) -> None:
    """Add `new` results to those of earlier calls, in place of those of the same setting, and the call's command."""
    new = json.loads(json.dumps(new))
    keys = [(row["model"], row["data"], row["pairs"]) for row in new]
    kept = [row for row in found["results"] if (row["model"], row["data"], row["pairs"]) not in keys]
    found["results"] = kept + new
    given = [f"--model {Path(m).name}" for m in args.model] + [f"--data {Path(d).name}" for d in args.data]
    given += [f"--pairs {' '.join(map(str, args.pairs))} --seeds {args.seeds} --max-length {args.max_length}"]
    command = f"python -m prudent.bench.{module} {' '.join(given)} --cache CACHE --output OUT"
    found["commands"] = [*(c for c in found["commands"] if c != command), command]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write fit.json and fit.md, print the page."""
    parser = options(__doc__, (300, 1000, 4000))
    parser.add_argument("--seconds", action="store_true", help="time the exact fit instead")
    args = parser.parse_args(argv)
    if not args.seconds and not (args.model and args.data and args.cache):
        parser.error("--model, --data and --cache are needed, or --seconds")
    file = args.output / "fit.json"
    found = read_json(file) if file.exists() else {"commands": [], "results": []}
    if args.seconds:
        here = asdict(machine.describe("cpu", quick=True))
        found["machine"] = {k: here[k] for k in ("name", "threads", "commit", "date")}
        found["seconds"] = seconds(MADE)
    else:
        add_up(found, run(args, measure, summarise), args, "fit")
    args.output.mkdir(parents=True, exist_ok=True)
    atomic_write_json(file, found)
    atomic_write_text(args.output / "fit.md", page(found))
    print(page(found))


if __name__ == "__main__":
    main()
