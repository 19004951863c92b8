"""The static table of `advantages`' Triton kernels: how many tokens a program holds at a time.

Lengths fall into buckets, so that batches of different lengths share compiled kernels. The table is the same for every
architecture.
"""

from __future__ import annotations

import torch

from ..launch import Config

SWEEP = 256  # sequences that the last program adds up at a time: two fp64 sums a thread

# block_dim = tokens that a program holds, block_rows = 1: one sequence per program, which loops over longer rows.
# 4 tokens a thread: with 8, gfx942 spills scalar registers, and fp64 does so already with 4.
_SHORT = Config(1, 512, 4, 1)
_LONG = Config(1, 1024, 8, 1)
_DOUBLE = Config(1, 256, 4, 1)


def config(length: int, dtype: torch.dtype) -> Config:
    """The tile for rows of `length` tokens computed in `dtype`, float32 or float64."""
    if dtype == torch.float64:
        return _DOUBLE
    return _SHORT if length <= _SHORT.block_dim else _LONG
