"""Fit the heads of one setting: a gold, a number of pairs, a share of noise and a seed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....engine import EnsembleHead, calibrate
from ...reward.convex import fit_ridge
from ...reward.fit import PairFeatures, fit_heads
from ...reward.pet.fit import PETFeatures, fit_pet
from ...reward.two_stage import fit_two_stages, seeded
from .config import OveroptimisationConfig
from .world import Both

HEADS = ("tuned", "ensemble", "shipped", "brme", "pet", "bsr")


class Setting(NamedTuple):
    gold: str
    pairs: int
    noise: float
    seed: int

    def __str__(self) -> str:
        return f"{self.gold}-{self.pairs}-{self.noise:g}-{self.seed}"


class Fitted(NamedTuple):
    """heads: by the names of `HEADS`; `ensemble` has K deep-ensemble members, `brme` K Gaussian heads.
    posterior: [P, N + A] fp32, Laplace's std of each candidate's reward.   l2: the chosen penalty."""

    heads: dict[str, EnsembleHead]
    posterior: Tensor
    l2: float


class Drawn(NamedTuple):
    """P pairs: prompt, chosen and rejected response [P] int64, by the noisy labels."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


def draw_pairs(gold: Tensor, pairs: int, noise: float, seed: int) -> Drawn:
    """Draw pairs within prompts at random from all that gold [T, S] tells apart; flip the share `noise` of the labels.

    Fewer pairs of the same seed are the beginning of more.

    Raises:
        ValueError: if gold tells fewer pairs apart.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.combinations(torch.arange(gold.shape[1])).unbind(1)
    gap = gold[:, first] - gold[:, second]  # [T, C]
    order = torch.randperm(gap.numel(), generator=generator)
    order = order[gap.flatten()[order] != 0][:pairs]
    if len(order) < pairs:
        raise ValueError(f"pairs: expected at most {len(order)}, the number that the gold tells apart, got {pairs}")
    prompt, place = order // gap.shape[1], order % gap.shape[1]
    wins = gap[prompt, place] > 0
    wins[torch.randperm(pairs, generator=generator)[: round(noise * pairs)]] ^= True
    a, b = first[place], second[place]
    return Drawn(prompt, torch.where(wins, a, b), torch.where(wins, b, a))


def fit_setting(features: Both, gold: Tensor, setting: Setting, config: OveroptimisationConfig) -> Fitted:
    """Fit every head on the pairs of one setting.

    Args:
        features: that heads read.   gold: [T, S] of the training responses.
    """
    drawn = draw_pairs(gold, setting.pairs, setting.noise, setting.seed)
    chosen, rejected = (features.training[drawn.prompt, side] for side in drawn[1:])
    ridge = fit_ridge(chosen, rejected, drawn.prompt, seed=setting.seed, posterior=True)
    assert ridge.posterior is not None
    bt = seeded(config.bt, setting.seed)
    shipped = fit_heads(chosen, rejected, bt, progress=False).head
    bsr = fit_heads(chosen, rejected, bt.model_copy(update={"bsr": config.bsr}), progress=False).head
    pairs = PairFeatures(chosen, rejected)
    brme = fit_two_stages(pairs, config.bt, config.brme, seed=setting.seed, stage1=shipped, progress=False).final
    calibrate(brme, torch.cat([chosen, rejected]))
    heads = {
        "tuned": ridge.head,
        "ensemble": _bootstrap(chosen, rejected, drawn.prompt, ridge.l2, config.ensemble, setting.seed),
        "shipped": shipped,
        "brme": brme,
        "pet": _pet(shipped, features.training, chosen, rejected, drawn.prompt, config, setting.seed),
        "bsr": bsr,
    }
    rows = features.candidates.flatten(0, 1).split(8192)
    posterior = torch.cat([ridge.posterior.std(block).float() for block in rows])
    return Fitted(heads, posterior.view(features.candidates.shape[:2]), ridge.l2)


def _bootstrap(chosen: Tensor, rejected: Tensor, prompts: Tensor, l2: float, members: int, seed: int) -> EnsembleHead:
    """The deep ensemble: ridge heads on resamples of the pairs, with the tuned head's penalty, as one head of K
    means."""
    generator = torch.Generator().manual_seed(seed)
    joined = EnsembleHead(chosen.shape[1], members, aggregation="mean")
    with torch.no_grad():
        joined.weight.zero_()
        for k in range(members):
            drawn = torch.randint(len(chosen), (len(chosen),), generator=generator)
            counts = torch.bincount(drawn, minlength=len(chosen))
            member = fit_ridge(chosen, rejected, prompts, weight=counts.double(), grid=(l2,)).head
            joined.weight[k], joined.bias[k] = member.weight[0], member.bias[0]
    return joined


def _pet(
    start: EnsembleHead,
    training: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    prompt: Tensor,
    config: OveroptimisationConfig,
    seed: int,
) -> EnsembleHead:
    """PET against the best of the reference responses of each pair's prompt."""
    used, place = prompt.unique(return_inverse=True)
    samples = training[used, : config.pet.samples]
    pet = seeded(config.pet, seed).model_copy(update={"samples": samples.shape[1]})
    data = PETFeatures(chosen, rejected, place, samples)
    return fit_pet(start, data, pet, progress=False).head
