"""The static table of `preference_step`'s Triton kernels: tiles by padded D and dtype, each with its reason.

Never keyed on timing, nor on P but to have no more programs than work. Every statement about registers and shared
memory is what `prudent bench --aot --op preference_step` prints with Triton 3.9; nothing here was timed on a GPU.

**One read.** A block of MP pairs is whole rows, and stays in the program's registers and shared memory from its
products to its share of the gradient: the features are read from memory once and never again, not even from a cache.
That is possible because a program holds only the directions that its pairs train, at most four vectors of D (sums of
the gradient) beside at most three (weights), instead of [2K, D]: at D = 4096 and fp32 16 KiB each, against 160 KiB for
K = 5. The weights are read once a program.

**Bytes in flight.** At 4.8 TB/s and 0.8 us of latency an H200 needs 29 KB on the way to each of its 132
multiprocessors. A program has (stages - 1) blocks under way while it works on another, a block being 4 MP D bytes in
16 bits: at D = 4096 16 KiB, so 4 stages have 48 KiB under way for a resident program, of which there is one for eq. 8
(112 registers a thread and more) and there are two on sm_90 for Bradley-Terry (64; by Triton 3.6 90, and one).
"""

from __future__ import annotations

import torch

from ..launch import Config

# Widest D whose vectors fit a program's registers, by loss. Eq. 8 holds twice the vectors, and would spill at
# 8192.
_MAX_DIM = {"bt": 8192, "brme": 4096}

LEAST_PAIRS = 4  # to a program: its partial sum of 4 D bytes a direction is then a quarter of 8 rows of 2 D or less


def max_dim(loss: str, dtype: torch.dtype, lanes: int) -> int:
    """Widest D that the kernels take; wider features run the reference on the device, and so does fp64 on AMD, whose
    loop runs out of scalar registers.
    """
    if dtype == torch.float64:
        return 0 if lanes == 64 else _MAX_DIM[loss] // 4
    return _MAX_DIM[loss]


def finish_config(dtype: torch.dtype) -> Config:
    """(partials, columns of D, warps, stages) of the kernel that adds the partials: 64 lines of 128 bytes a step (fp64:
    32 of 256), whole cache lines, and 2 steps under way.
    """
    return Config(32 if dtype == torch.float64 else 64, 32, 4, 3)


def padded(dim: int) -> int:
    """D as a power of two, at least 128: four features a lane."""
    return max(128, 1 << (dim - 1).bit_length())


def step_config(dim: int, dtype: torch.dtype, lanes: int) -> Config:
    """(pairs, padded D, warps, stages) of the kernel that reads the features, on warps of `lanes` threads.

    Warps: 8 features of a row to a thread (fp64, which only correctness asks for: 4), so that a vector of D costs 8
    registers; 16 to a thread at D = 8192 and 32 lanes, where a program of more warps would leave 64 registers to a
    thread. Pairs: two where one pair's rows are at most 8 KiB in fp32. Stages: what the bytes in flight need, inside 64
    KiB of shared memory; fewer with 64 lanes (AMD), where more run out of scalar registers for their addresses.
    """
    wide = padded(dim)
    each = 4 if dtype == torch.float64 else 8
    warps = max(1, min(16, wide // (each * lanes)))
    pairs = 2 if wide <= 1024 and dtype != torch.float64 else 1
    block = 2 * pairs * wide * dtype.itemsize
    stages = 4 if lanes == 32 else 2 if wide > 1024 else 1
    while stages > 1 and (stages - 1) * block > 56 * 1024:
        stages -= 1
    return Config(pairs, wide, warps, stages)


def shares_of(pairs: int, groups: int, dim: int) -> int:
    """Programs to each of `groups` groups of the pairs: all of them have partial sums of 4 MiB a direction at most (256
    programs at D = 4096, two to a multiprocessor of 132), which is small beside features that take longer to read than
    a launch does, and is written to and read from the second-level cache.
    """
    most = max(256, min(2048, 2**20 // padded(dim)))
    return max(1, min(most // groups, -(-pairs // (groups * LEAST_PAIRS))))
