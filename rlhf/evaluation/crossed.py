"""Intervals of means over seeds and prompts, both of which are samples."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .statistics import Interval


def crossed_interval(values: Tensor, resamples: int = 2000, seed: int = 0) -> Interval:
    """[S, P] -> mean and 95 % percentile interval over S seeds and P prompts, each drawn with replacement.

    Every seed has the same prompts, so seeds and prompts are resampled separately, and a drawn seed takes its values
    for the drawn prompts. With 5 seeds such an interval is somewhat too narrow.
    """
    seeds, prompts = values.shape
    rows, columns = _shares(seeds, resamples, seed), _shares(prompts, resamples, seed + 1)
    drawn = ((rows @ values.double()) * columns).sum(dim=1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.double().mean()), low, high)


@lru_cache(maxsize=8)
def _shares(size: int, resamples: int, seed: int) -> Tensor:
    """[resamples, size] fp64: how often each of `size` things is drawn, divided by `size`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(size, (resamples, size), generator=generator)
    ones = torch.ones(resamples, size, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones) / size
