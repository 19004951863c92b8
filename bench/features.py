"""Compare what a reward head reads of the trunk, `last`, `wide` or `auto`, by the exact fit on human preferences.

    python -m prudent.bench.features --model DIR|smollm2 [...] --data PAIRS.jsonl[:ROWS] [...] --cache DIR --output DIR

`wide` is the trunk's output at the last token and the mean over the response at two thirds of the layers; `auto`, the
default of `prudent train` on a frozen decoder, has the response's log-probability too; the mean is also fitted alone.
For every model, data set, number of pairs and seed: split by prompt, draw the pairs, fit one head on each of the four
by `fit_ridge` with its defaults, and measure log-loss and accuracy on the pairs of the held-out prompts. The seed
changes the split, the pairs drawn and the folds. One forward pass of a text gives all. A later call for other models or
data adds to the results in the folder. Each call also times the forward pass with `last` and with `wide`, in turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..engine import EnsembleRewardModel, Scorer
from ..engine.taps import LOGPROB_SIZE
from ..rlhf.data.pairs import load_pairs
from ..rlhf.evaluation.statistics import group_labels
from ..rlhf.job.files import atomic_write_json, atomic_write_text, read_json
from ..rlhf.models.embedded import embedded_model
from ..rlhf.report.words import markdown_table, signed
from ..rlhf.reward.convex import fit_ridge
from ..rlhf.reward.run import AUTO_TAPS
from . import machine
from .fit import add_up, drawn, interval, options, pooled, run, scored
from .nominal_head import Study, answer_lengths

PARTS = ("last", "wide", "mean", "auto")
BASES = {"wide": "last", "mean": "last", "auto": "wide"}  # each part -> what it is compared with
SIZES = (100, 300, 1000, 4000)
TEXTS, ROUNDS = 48, 5  # of the timing of the forward pass


class Measured(NamedTuple):
    """On P held-out pairs, by part: log-loss and correctness [P], the chosen l2, the processor seconds of the fit.

    longer: whether the preferred answer is the longer one, [P].
    """

    prompts: list[str]
    loss: dict[str, Tensor]
    correct: dict[str, Tensor]
    l2: dict[str, float]
    seconds: dict[str, float]
    longer: Tensor


def part(name: str, features: Tensor) -> Tensor:
    """The columns of features [P, 2D + 2] with the taps `AUTO_TAPS` that a head on one of `PARTS` reads."""
    size = features.shape[1] - LOGPROB_SIZE
    ends = {"last": (0, size // 2), "mean": (size // 2, size), "wide": (0, size), "auto": (0, features.shape[1])}
    return features[:, slice(*ends[name])]


def measure(study: Study, pairs: int, seed: int) -> Measured | None:
    """One seed with `pairs` training pairs; None if there are fewer."""
    parts = drawn(study, pairs, seed)
    if parts is None:
        return None
    train, held_out = parts
    sides, held_sides = study.sides(train), study.sides(held_out)
    labels = group_labels(pair.prompt_key for pair in train)
    chosen, rejected = answer_lengths(held_out)
    found = Measured([pair.prompt_key for pair in held_out], {}, {}, {}, {}, (chosen > rejected).double())
    for name in PARTS:
        start = time.process_time()
        fit = fit_ridge(part(name, sides[0]), part(name, sides[1]), labels, seed=seed)
        found.seconds[name], found.l2[name] = time.process_time() - start, fit.l2
        held = part(name, held_sides[0]), part(name, held_sides[1])
        found.loss[name], found.correct[name] = scored(fit.head, held)
    return found


def summarise(runs: Sequence[Measured]) -> dict[str, Any]:
    """Each part's means over all seeds' held-out pairs, and minus those of its base with the paired interval."""
    seeds, prompts, counts = pooled([run.prompts for run in runs])
    result: dict[str, Any] = {
        **counts,
        "longer": float(torch.cat([run.longer for run in runs]).mean()),
        "l2": {name: [run.l2[name] for run in runs] for name in PARTS},
        "fit_seconds": {name: statistics.mean(run.seconds[name] for run in runs) for name in PARTS},
    }
    for name in ("loss", "correct"):
        values = {p: torch.cat([getattr(run, name)[p] for run in runs]) for p in PARTS}
        result[name] = {p: float(value.mean()) for p, value in values.items()}
        result[name]["minus_base"] = {
            p: interval(values[p] - values[base], seeds, prompts)._asdict() for p, base in BASES.items()
        }
    return result


def forward(model_name: str, file: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the forward pass over TEXTS texts with `last` and with `wide`, a pair of times for each round."""
    source = str(embedded_model()) if model_name == "smollm2" else model_name
    wide = EnsembleRewardModel.from_trunk(source, taps="wide", dtype=getattr(torch, args.dtype))
    last = EnsembleRewardModel.from_trunk(wide.model)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    sides = [item for pair in load_pairs(file).pairs for item in pair.items()]
    items = random.Random(0).sample(sides, min(TEXTS, len(sides)))
    scorers = {
        name: Scorer(model, tokenizer, max_length=args.max_length, progress=False)
        for name, model in (("last", last), ("wide", wide))
    }
    read = {name: [scorer.read(item) for item in items] for name, scorer in scorers.items()}
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for number in range(-1, ROUNDS):  # the first round is a warm-up
        for name in ("last", "wide") if number % 2 else ("wide", "last"):
            start = time.process_time()
            scorers[name].features(read[name])
            if number >= 0:
                times[name].append(time.process_time() - start)
    tokens = sum(len(ids) for ids in {tuple(each.ids) for each in read["last"]})
    return {"model": Path(model_name).name, "texts": len(items), "tokens": tokens, "seconds": times}


def verdict(results: Sequence[dict[str, Any]], name: str) -> str:
    """One sentence: in how many settings a head on part `name` is better than one on its base (`BASES`)."""
    said, worse = [], 0
    for noun, key, word, sign in (("log-loss", "loss", "lower", -1), ("accuracy", "correct", "higher", 1)):
        gaps = [row[key]["minus_base"][name] for row in results]
        # the bounds of the gain, whichever way the measure points
        gains = [sorted((sign * gap["low"], sign * gap["high"])) for gap in gaps]
        better, beyond = sum(sign * gap["value"] > 0 for gap in gaps), sum(low > 0 for low, _ in gains)
        worse += sum(high < 0 for _, high in gains)
        said.append(f"a {word} {noun} in {better} of {len(gaps)} settings ({beyond} beyond the 95 % interval)")
    label = "the mean alone" if name == "mean" else f"`{name}`"
    base = BASES[name]
    nowhere = f"worse beyond the interval {f'{worse} times' if worse else 'nowhere'}"
    return f"On held-out prompts, a head on {label} has {said[0]} and {said[1]} than one on `{base}`, {nowhere}."


def _table(results: Sequence[dict[str, Any]], key: str, head: str, longer: bool) -> list[str]:
    rows = [["model", "data", "pairs", f"{head}, last", *BASES, *(f"{p} minus {base}" for p, base in BASES.items())]]
    rows[0] += ["longer answer"] if longer else []
    for row in results:
        cells = [f"{row[key][name]:.3f}" for name in PARTS]
        cells += [signed(tuple(row[key]["minus_base"][name].values()), 3) for name in BASES]
        cells += [f"{row['longer']:.3f}"] if longer else []
        rows.append([row["model"], row["data"], str(row["pairs"]), *cells])
    return markdown_table(rows)


def _seconds(results: Sequence[dict[str, Any]], forwards: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = [["model", "pairs", "fit, last", "wide", "forward pass, last", "wide", "wide / last"]]
    for model, found in forwards.items():
        last, wide = (found["seconds"][name] for name in ("last", "wide"))
        ratios = [b / a for a, b in zip(last, wide, strict=True)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        speeds = [f"{found['tokens'] / statistics.median(times):.0f} tokens/s" for times in (last, wide)]
        for size in sorted({row["pairs"] for row in results if row["model"] == model}):
            fits = [row["fit_seconds"] for row in results if row["model"] == model and row["pairs"] == size]
            cells = [f"{statistics.mean(fit[name] for fit in fits):.2f} s" for name in ("last", "wide")]
            rows.append([model, str(size), *cells, *speeds, ratio])
    return markdown_table(rows)


def page(found: dict[str, Any]) -> str:
    """features.md."""
    results, here = found["results"], found["machine"]
    models = list(dict.fromkeys(row["model"] for row in results))
    by_model = [f"- {m}: {verdict([row for row in results if row['model'] == m], 'wide')}" for m in models]
    return "\n".join(
        [
            "# What a reward head reads: last, wide, auto, the mean alone",
            "",
            verdict(results, "wide"),
            "",
            *by_model,
            f"- {verdict(results, 'auto')}",
            f"- {verdict(results, 'mean')}",
            "",
            "A setting is a model, a data set and a number of training pairs; those of one data set share pairs, so",
            "that their verdicts are not independent.",
            "",
            "Human preference pairs, split by prompt; a frozen trunk; the exact fit (`bt.solver=newton`), its L2",
            "chosen for each; the same pairs for all. `wide`: the trunk's output at the last token, and the mean over",
            "the response at two thirds of the layers; `auto`: these and the response's log-probability; `mean`: that",
            f"mean alone. Means over the held-out pairs of {results[0]['seeds']} seeds.",
            "In brackets: 95 % intervals of the paired difference, from resampling seeds and prompts. longer answer:",
            "the accuracy of preferring the answer with more characters. `FILE:N` is the first N rows of a file.",
            "",
            *(f"    {command}" for command in found["commands"]),
            "",
            *_table(results, "loss", "log-loss", longer=False),
            "",
            *_table(results, "correct", "accuracy", longer=True),
            "",
            "## Seconds",
            "",
            "Processor seconds of one exact fit (folds, grid and refit), the mean over seeds and data sets; and of the",
            f"forward pass over {TEXTS} texts: the median of {ROUNDS} rounds, in turns, and the ratio within a round",
            "(least to greatest). Processor seconds are those of this process; other work ran beside it.",
            f"{here['name']}, threads: {here['threads']}, commit {here['commit'][:12]}, {here['date']}.",
            "",
            *_seconds(results, found["forward"]),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write features.json and features.md, print the page."""
    parser = options(__doc__, SIZES)
    args = parser.parse_args(argv)
    if not (args.model and args.data and args.cache):
        parser.error("--model, --data and --cache are needed")
    file = args.output / "features.json"
    found = read_json(file) if file.exists() else {"commands": [], "results": [], "forward": {}}
    add_up(found, run(args, measure, summarise, taps=AUTO_TAPS), args, "features")
    for model in args.model:
        if Path(model).name in found["forward"]:
            continue
        found["forward"][Path(model).name] = forward(model, args.data[0].partition(":")[0], args)
    here = machine.describe("cpu", quick=True)
    found["machine"] = {name: getattr(here, name) for name in ("name", "threads", "commit", "date")}
    args.output.mkdir(parents=True, exist_ok=True)
    atomic_write_json(file, found)
    atomic_write_text(args.output / "features.md", page(found))
    print(page(found))


if __name__ == "__main__":
    main()
