"""Compare BRME's nominal head with a single Bradley-Terry head when the trunk is trained (the paper's table 5).

    python -m prudent.bench.trained_trunk --model DIR|smollm2 --mode lora|full --data FILE.jsonl --work DIR --output DIR

For every data set and seed: draw pairs, and run `prudent train` on them, which splits them by prompt, trains stage 1
(Bradley-Terry, one head) and stage 2 (BRME, K heads), each with its trunk. The seed changes the pairs, the split, the
initial weights and the order. Accuracy is measured on the held-out pairs. Every call adds its results to
trained_trunk.json, or replaces them, and writes trained_trunk.md anew. A call that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..rlhf.data.pairs import PreferencePair, load_pairs, split_by_prompt
from ..rlhf.evaluation.statistics import group_labels, pair_correct
from ..rlhf.job.config import load_config
from ..rlhf.job.files import atomic_write_json, atomic_write_text, read_json
from ..rlhf.models.embedded import embedded_model
from ..rlhf.models.features import compute_features
from ..rlhf.models.loading import load_reward
from ..rlhf.reward.train import TrainConfig, run_train
from . import machine
from .fit import interval
from .nominal_head import SCORERS, Sides, answer_lengths, head_rewards, summarise, table, verdict

Run = tuple[list[str], dict[str, Sides]]  # the held-out prompts, and each scorer's rewards of their pairs


def one_run(args: argparse.Namespace, data: Path, seed: int, folder: Path) -> Run:
    """Train both stages on the pairs of one seed, unless `folder` has the rewards already; return these."""
    done = folder / "held_out.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pairs = folder / "pairs.jsonl"
        lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
        atomic_write_text(pairs, "".join(random.Random(seed).sample(lines, min(args.pairs, len(lines)))))
        source = str(embedded_model()) if args.model == "smollm2" else args.model
        config = load_config(
            TrainConfig,
            None,
            args.set,
            model=source,
            data=str(pairs),
            output=folder / "run",
            mode=args.mode,
            seed=seed,
            eval_fraction=args.held_out,
            max_length=args.max_length,
        )
        start = time.monotonic()
        run_train(config, resume=True, progress=False)
        _, held_out = split_by_prompt(load_pairs(pairs).pairs, config.eval_fraction, seed)
        sides = {
            name: [column.tolist() for column in both] for name, both in held_out_rewards(config, held_out).items()
        }
        prompts = [pair.prompt_key for pair in held_out]
        atomic_write_json(done, {"prompts": prompts, "seconds": time.monotonic() - start, "sides": sides})
        shutil.rmtree(folder / "run")  # a gigabyte
    found: dict[str, Any] = read_json(done)
    return found["prompts"], {name: (torch.tensor(c), torch.tensor(r)) for name, (c, r) in found["sides"].items()}


def held_out_rewards(config: TrainConfig, pairs: list[PreferencePair]) -> dict[str, Sides]:
    """Each scorer's rewards of the pairs, from the models and the features in the run folder."""
    items = [pair.items() for pair in pairs]
    sides: list[dict[str, torch.Tensor]] = [{}, {}]
    models = {name: load_reward("output", str(config.output / name)) for name in ("stage1", "model")}
    for i, rewards in enumerate(sides):
        texts = [both[i] for both in items]
        features = {
            name: compute_features(
                loaded.scorer(config.batch_tokens), texts, config.output / "features", False
            ).features
            for name, loaded in models.items()
        }
        single, ensemble = (models[name].model.score for name in ("stage1", "model"))
        rewards |= head_rewards(single, features["stage1"], ensemble, features["model"])
    result = {name: (sides[0][name], sides[1][name]) for name in sides[0]}
    return {**result, "longer answer": answer_lengths(pairs)}


def summary(runs: list[Run]) -> dict[str, Any]:
    """`nominal_head.summarise`, but the intervals of the differences resample seeds too.

    Training a trunk changes more from seed to seed than training heads does, and there are fewer seeds.
    """
    result = summarise(runs)
    prompts = group_labels(prompt for names, _ in runs for prompt in names)
    seeds = torch.cat([torch.full((len(names),), i) for i, (names, _) in enumerate(runs)])
    right = {name: torch.cat([pair_correct(*sides[name]).double() for _, sides in runs]) for name in SCORERS}
    for name, row in result["rows"].items():
        row["minus_single"] = interval(right[name] - right["single"], seeds, prompts)._asdict()
    return result


def report(results: list[dict[str, Any]]) -> str:
    """The content of trained_trunk.md."""
    runs = "\n".join(f"    {r['command']}\n\n{r['machine']}.\n" for r in results)
    about = f"""# The nominal head against a single head, with a trained trunk

BRME (arXiv 2409.15360, table 5) reports 75.6 % pair accuracy for the nominal head (least predicted std) and 74.5 % for
a single Bradley-Terry head, in 8B models trained whole. Here both stages train their trunk, by LoRA or in full, as
`prudent train` does it, at a size that a CPU can do: small models, few and short pairs. `nominal_head.md` has the same
comparison on a frozen trunk. Heads are compared as saved: calibrated on training features. A seed (0, 1, ...) sets the
pairs drawn, their split by prompt, the initial weights and the order. Intervals: 95 %, percentile bootstrap, all seeds'
held-out pairs together; an accuracy's resamples prompts, a difference's prompts and, crossed with them, seeds.
`smollm2` is the model of `prudent demo`; DATA, WORK and OUT are folders.

{runs}
## What came out
"""
    return "\n".join([about, *verdict(results), "\n## Tables", *table(results), ""])


def here() -> str:
    """The processor, threads, commit, date and torch of this call."""
    found = machine.describe("cpu", quick=True)
    return (
        f"{found.name}, {found.threads} thread{'s' * (found.threads > 1)}; commit {found.commit[:12]}, {found.date}; "
        f"torch {found.versions['torch']}"
    )


def main() -> None:
    """Run, or go on, print the verdicts, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder, hub name or smollm2")
    parser.add_argument("--mode", required=True, choices=("lora", "full"), help="how the trunk is trained")
    parser.add_argument("--data", action="append", required=True, type=Path, help="JSON lines of pairs; repeatable")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of trained_trunk.json and trained_trunk.md")
    parser.add_argument("--pairs", type=int, default=450, help="pairs drawn for each seed (default %(default)s)")
    parser.add_argument("--held-out", type=float, default=0.33, help="share of prompts held out (default %(default)s)")
    parser.add_argument("--max-length", type=int, default=96, help="tokens kept, from the end (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of `prudent train`; repeatable")
    args = parser.parse_args()
    name = Path(args.model).name
    changes = "".join(f", {entry}" for entry in args.set)
    given = [f"--pairs {args.pairs} --held-out {args.held_out:g} --max-length {args.max_length} --seeds {args.seeds}"]
    given += [f"--set {entry}" for entry in args.set]
    file = args.output / "trained_trunk.json"
    for data in args.data:
        label = f"{name}, {args.mode}{changes}, {data.stem}"
        work = args.work / "-".join([name, args.mode, *args.set, data.stem, f"{args.pairs}x{args.max_length}"])
        runs = [
            one_run(args, data, seed, work / f"seed-{seed}") for seed in tqdm(range(args.seeds), label, unit="seed")
        ]
        command = f"python -m prudent.bench.trained_trunk --model {name} --mode {args.mode} --data DATA/{data.name} "
        command += f"{' '.join(given)} --work WORK --output OUT"
        found = {"model": f"{name}, {args.mode}{changes}", "data": data.stem, "command": command}
        found |= {"machine": here(), **summary(runs)}
        # read as late as this, so that a call beside this one loses nothing
        results: dict[str, dict[str, Any]] = read_json(file) if file.exists() else {}
        results[label] = json.loads(json.dumps(found))
        args.output.mkdir(parents=True, exist_ok=True)
        atomic_write_json(file, results)
        atomic_write_text(args.output / "trained_trunk.md", report(list(results.values())))
    print("\n".join(verdict(list(results.values()))))


if __name__ == "__main__":
    main()
