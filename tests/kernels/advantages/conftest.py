"""Batches for the advantage tests: the kinds of mask that trainers use, and NaN at masked tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _mask(kind: str, batch: int, length: int, g: torch.Generator) -> Tensor:
    t = torch.arange(length)
    ends = torch.randint(1, length + 1, (batch, 1), generator=g)
    if kind == "full":
        return torch.ones(batch, length, dtype=torch.bool)
    if kind == "right":  # padding on the right
        return t < ends
    if kind == "left":
        return t >= length - ends
    if kind == "prompt":  # the prompt masked, padding on the right
        return (t < ends) & (t >= ends // 3)
    assert kind == "holes"  # a tool's tokens between two turns of the policy
    return (t < ends) & ~((t >= ends // 3) & (t < ends // 2))


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """score [B], logprob, ref_logprob, value, mask [B, T]; NaN where masked. `value_after`: values are real one step
    after a token too, as TRL has them.
    """

    def make(
        kind: str = "right",
        batch: int = 6,
        length: int = 13,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        value_after: bool = False,
    ) -> Batch:
        g = torch.Generator().manual_seed(seed)
        mask = _mask(kind, batch, length, g)
        score = torch.randn(batch, generator=g, dtype=torch.float64)
        tokens = [torch.randn(batch, length, generator=g, dtype=torch.float64) for _ in range(3)]
        keep = mask.clone()
        if value_after:
            keep[:, 1:] |= mask[:, :-1]
        for tensor, real in zip(tokens, (mask, mask, keep), strict=True):
            tensor[~real] = float("nan")
        logprob, ref_logprob, value = (t.to(dtype) for t in tokens)
        return score.to(dtype), logprob, ref_logprob, value, mask

    return make
