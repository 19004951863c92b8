"""Intervals of means over seeds and prompts, both of which are samples."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import Interval


def crossed_means(values: Tensor, resamples: int, seed: int = 0) -> Tensor:
    """[..., S, P] -> [resamples, ...]: means over S seeds and P prompts, each drawn with replacement.

    Every seed has the same prompts, so seeds and prompts are resampled separately, and a drawn seed takes its
    values for the drawn prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds, prompts = values.shape[-2:]

    def counts(size: int) -> Tensor:
        drawn = torch.randint(size, (resamples, size), generator=generator)
        return torch.zeros(resamples, size, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(resamples, size, dtype=torch.float64)
        )

    rows, columns = counts(seeds) / seeds, counts(prompts) / prompts
    return torch.einsum("...sp,rs,rp->r...", values.double(), rows, columns)


def crossed_interval(values: Tensor, resamples: int = 2000, seed: int = 0) -> Interval:
    """[S, P] -> mean and 95 % percentile interval. With 5 seeds such an interval is somewhat too narrow."""
    drawn = crossed_means(values, resamples, seed)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.double().mean()), low, high)
