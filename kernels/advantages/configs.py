"""The static table of `advantages`' Triton kernels: how many tokens a program holds at a time.

Bucketed, so that a batch padded to another length finds its kernel compiled; nothing depends on the architecture.
`shipped` walks through every row of the table for tools that compile it ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..launch import Config

SWEEP = 256  # sequences that the last program totals at a time: two fp64 sums a thread

# block_dim = tokens a program holds, block_rows = 1: a program is a sequence. Longer rows are looped over with a carry.
# 4 tokens a thread: with 8, gfx942 spills scalar registers, and fp64 does so already with 4.
_SHORT = Config(1, 512, 4, 1)
_LONG = Config(1, 1024, 8, 1)
_DOUBLE = Config(1, 256, 4, 1)


def config(length: int, dtype: torch.dtype) -> Config:
    """The tile for rows of `length` tokens computed in `dtype`, float32 or float64."""
    if dtype == torch.float64:
        return _DOUBLE
    return _SHORT if length <= _SHORT.block_dim else _LONG


def shipped(target: str, full: bool = True) -> Iterable[tuple[str, Callable[[], None]]]:
    """(label, run) for every configuration that `target` can be given: `run`, under `recording()`, launches the op on
    tensors without data. Not `full`: fp32 alone.
    """
    del target  # every one gets the same
    for length in (512, 4096):
        yield f"fp32-T{length}", _run(torch.float32, length, "k3", "after", True)
    if full:
        yield "bf16-T4096", _run(torch.bfloat16, 4096, "k3", "after", True)
        yield "fp64-T4096", _run(torch.float64, 4096, "k3", "after", True)
        yield "no-critic-k1-T4096", _run(torch.float32, 4096, "k1", "last", False)


def _run(dtype: torch.dtype, length: int, estimator: str, score_at: str, critic: bool) -> Callable[[], None]:
    def run() -> None:
        from . import triton  # type: ignore[attr-defined]
        from .contract import Inputs

        tokens = torch.empty(64, length, dtype=dtype, device="meta")
        score, mask = tokens[:, 0], torch.empty(64, length, dtype=torch.bool, device="meta")
        value = tokens if critic else None
        triton.forward(
            Inputs(score, tokens, tokens, value, mask, 1.0, 0.95, 0.05, estimator, 10.0, "skip", score_at, "sample")
        )

    return run
