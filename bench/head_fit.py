"""Time the training of reward heads on cached features: `fit_heads` with `preference_step` against autograd.

    python -m prudent.bench.head_fit [--pairs 20000] [--dims 576 4096] [--out bench/results]

Both run the same shuffled batches, AdamW and schedule on bfloat16 features. A round times one whole fit of each side,
and the sides take turns to be first. Ratios are within a round, so that both sides see the same load on the machine.
Writes head_fit.json and head_fit.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from ..rlhf.job.files import atomic_write_json, atomic_write_text
from ..rlhf.reward import fit
from ..rlhf.reward.config import BradleyTerryConfig, BRMEConfig, FitConfig
from ..rlhf.reward.losses import bradley_terry, brme, bsr
from . import machine

HEADS = 5
SIDES = ("preference_step", "autograd")


class Autograd(fit._State):
    """The same training with each step composed: gather, standardise, `ensemble_reward`, loss, backward."""

    def _gradient(self, index: Tensor, step: int) -> Tensor:
        config, data, pairs = self.config, self.data, len(index)
        features = self.scaling(torch.cat([data.chosen[index], data.rejected[index]]))
        out = self.head(features, aggregation="mean")
        if config.stage == "bt":
            margin = None if data.margin is None else data.margin[index]
            loss = bradley_terry(out.reward[:pairs], out.reward[pairs:], margin)
        else:
            assert data.p_hat is not None
            noise = None
            if config.noise == "sampled":
                noise = fit.step_noise(config.seed, step, *out.mean.shape, device=out.mean.device)
            loss = brme(out.mean, out.std, data.p_hat[index], self.assigned[index], config.alpha, noise)
        if config.bsr:
            loss = loss + bsr(out.reward_sum, pairs, config.bsr)
        loss.backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach(), out.std.detach().mean()])


def made_features(pairs: int, dim: int, seed: int = 0) -> fit.PairFeatures:
    """Random features [P, D] in bfloat16, with a different scale and offset in each dimension, and p_hat [P]."""
    g = torch.Generator().manual_seed(seed)
    scale, offset = torch.logspace(-1, 1, dim), torch.logspace(1, -1, dim)
    sides = [(torch.randn(pairs, dim, generator=g) * scale + offset).bfloat16() for _ in range(2)]
    return fit.PairFeatures(sides[0], sides[1], torch.rand(pairs, generator=g).clamp(0.01, 0.99))


def train(side: str, data: fit.PairFeatures, config: FitConfig) -> fit.Fit:
    """Run `fit_heads` unchanged (`preference_step`), or with every step by autograd."""
    p_hat = data.p_hat if config.stage == "brme" else None
    state = fit._State if side == "preference_step" else Autograd
    with mock.patch.object(fit, "_State", state):
        return fit.fit_heads(data.chosen, data.rejected, config, p_hat=p_hat, progress=False)


def measure(data: fit.PairFeatures, config: FitConfig, rounds: int) -> dict[str, Any]:
    """Wall and processor seconds of each side in each round, and the difference between the two trained heads."""
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    heads = {}
    for number in range(-1, rounds):  # the first round is a warm-up
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            wall, cpu = time.perf_counter(), time.process_time()
            heads[side] = train(side, data, config).head.weight
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if number >= 0:
                times[side].append(spent)
    ours, theirs = (heads[side].detach().double() for side in SIDES)
    return {
        "loss": config.stage,
        "heads": config.num_heads,
        "pairs": len(data.chosen),
        "dim": data.chosen.shape[1],
        "epochs": config.epochs,
        "seconds": times,
        "weight_difference": float((ours - theirs).abs().max() / theirs.abs().max()),
    }


def summary(row: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """clock, processor -> autograd's seconds / preference_step's: (median, least, greatest) over rounds."""
    found = {}
    for i, name in enumerate(("clock", "processor")):
        sides = zip(row["seconds"]["autograd"], row["seconds"]["preference_step"], strict=True)
        ratios = [theirs[i] / ours[i] for theirs, ours in sides]
        found[name] = (statistics.median(ratios), min(ratios), max(ratios))
    return found


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The Markdown table: median seconds of an epoch, and the ratios with their range over rounds."""
    yield "| loss | features | preference_step | autograd | times as long, by the clock | by the processor | weights |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        epoch = [statistics.median(t for t, _ in row["seconds"][side]) / row["epochs"] for side in SIDES]
        ratios = [f"{mid:.2f} ({low:.2f} to {high:.2f})" for mid, low, high in summary(row).values()]
        yield (
            f"| {row['loss']}, K = {row['heads']} | 2 x {row['pairs']} x {row['dim']} | {epoch[0]:.2f} s | "
            f"{epoch[1]:.2f} s | {ratios[0]} | {ratios[1]} | {row['weight_difference']:.0e} |"
        )


def page(rows: Sequence[dict[str, Any]], here: machine.Machine, rounds: int, epochs: int) -> str:
    """head_fit.md."""
    about = f"""# A step of head training: `preference_step` against autograd

`python -m prudent.bench.head_fit` trains the same heads twice on the same bfloat16 features: `fit_heads` as it is, and
with each step composed of gather, standardising, `ensemble_reward`, loss and backward. Seconds are those of an epoch,
set-up included: the median of {rounds} rounds of {epochs} epochs. "Times as long" is autograd's time over
`preference_step`'s within a round: the median, and least to greatest. weights: the largest difference between the two
trained heads, over the largest weight.

{here.name}, {here.threads} threads, {here.isa}; commit {here.commit[:12]}, {here.date}; torch {here.versions["torch"]}
"""
    return "\n".join([about, *table(rows), ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs (default %(default)s)")
    parser.add_argument("--dims", type=int, nargs="+", default=[576, 4096], help="widths (default 576 4096)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a fit (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/head_fit"), help="folder (default %(default)s)")
    args = parser.parse_args(argv)
    configs: list[FitConfig] = [
        BradleyTerryConfig(solver="adamw", epochs=args.epochs),
        BRMEConfig(epochs=args.epochs, num_heads=HEADS, max_steps=None),
    ]
    here = machine.describe("cpu", quick=True)
    rows = []
    for dim in tqdm(args.dims, unit="width"):
        data = made_features(args.pairs, dim)
        rows += [measure(data, config, args.rounds) for config in configs]
    print("\n".join(table(rows)))
    args.out.mkdir(parents=True, exist_ok=True)
    known = {k: v for k, v in asdict(here).items() if k not in ("bandwidth", "matrix")}  # measured quickly, not used
    atomic_write_json(args.out / "head_fit.json", {"machine": known, "rows": json.loads(json.dumps(rows))})
    atomic_write_text(args.out / "head_fit.md", page(rows, here, args.rounds, args.epochs))


if __name__ == "__main__":
    main()
