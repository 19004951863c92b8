"""Rewards of one step's samples by heads on the policy's trunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ....engine import EnsembleHead
from ....kernels import nominal_reward
from .sources import Rewards


@torch.no_grad()
def judge(head: EnsembleHead, features: Tensor, seed: int | None = None) -> Rewards:
    """Compute the rewards of all of a step's samples in one call of the heads.

    One call, because a reward may depend on the whole step (the worst head of the batch), and because the noise of a
    sampled reward is numbered by row: so it depends on `seed` and the sample's number, not on how the forward passes
    were cut.

    Args:
        head: its aggregation is used, without centring.
        features: [N, D], what the heads read of each sample; NaN where the sample cannot be read.
        seed: samples every head (BRME 5.1: mean + std * noise), unless the aggregation says source=mean; None: means.

    Returns:
        Rewards on the device of `features`: reward NaN where any mean or std is not finite, which leaves the sample out
        of the batch that the others are compared in. nominal and worst are of the means, sampled or not.
    """
    key = None if seed is None else torch.tensor([seed], device=features.device)
    out = head(features, seed=key, centre="none")
    reward, mean, std = out.reward, out.mean, out.std
    usable = (mean.isfinite() & std.isfinite()).all(dim=1)
    if not bool(usable.all()):
        reward = torch.full_like(reward, float("nan"))
        if bool(usable.any()):
            reward[usable] = head(features[usable], seed=key, centre="none").reward
    if head.num_heads == 1:
        return Rewards(reward, mean=mean, std=std, distance=out.distance)
    nominal = nominal_reward(mean, std, head.aggregation, head.std_ref)
    return Rewards(reward, nominal, mean.amin(dim=1), mean, std, out.distance)
