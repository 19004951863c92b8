"""The static table of `preference_step`'s Triton kernels: tiles by padded D and dtype, each with its reason.

Tiles never depend on timing, and on P only so that there are no more programs than work. `prudent bench --aot --op
preference_step` with Triton 3.9 prints the numbers of registers and shared memory; nothing here was timed on a GPU.

**One read.** A block is MP pairs of whole rows. It stays in the program's registers and shared memory from its products
to its share of the gradient, so features are read from memory once, and not a second time from a cache. That works
because a program holds only the directions that its pairs train, at most four vectors of D (sums of the gradient) and
at most three (weights), instead of [2K, D]: at D = 4096 in fp32, 16 KiB each instead of 160 KiB for K = 5. Each program
reads the weights once. Wider features are read twice, in column blocks: for the products, then for the gradient. The
second read comes from the second-level cache where that holds the batch: 512 pairs at D = 8192 in 16 bits are 16 MiB.

**Bytes in flight.** At 4.8 TB/s and 0.8 us of latency, each of an H200's 132 multiprocessors needs 29 KB in flight.
A program has (stages - 1) blocks in flight while it works on another. In 16 bits a block is 4 MP D bytes, 16 KiB at D =
4096, so with 4 stages a resident program has 48 KiB in flight. A multiprocessor holds one program for eq. 8 (109
registers a thread and more) and on sm_90 two for Bradley-Terry (64 registers, by Triton 3.6 too).
"""

from __future__ import annotations

import torch

from ..launch import Config

# The widest D whose vectors fit a program's registers, by loss. Eq. 8 holds twice the vectors, which spill at 8192.
_ONE_READ = {"bt": 8192, "brme": 4096}

LEAST_PAIRS = 4  # per program: its partial sum, 4 D bytes a direction, is at most a quarter of its 8 rows of 2 D bytes


def one_read(loss: str, dtype: torch.dtype, lanes: int) -> int:
    """The widest D whose whole rows a program holds; wider features are read twice. In fp64 on AMD all are, where the
    loop over whole rows runs out of scalar registers.
    """
    if dtype == torch.float64:
        return 0 if lanes == 64 else _ONE_READ[loss] // 4
    return _ONE_READ[loss]


def wide_config(dtype: torch.dtype, lanes: int) -> Config:
    """(pairs, columns of D, warps, stages) of the two kernels that read wide features.

    A thread holds 16 features (8 of 2 rows; fp64: 8) and as many sums for each of up to four directions. In 16 bits a
    block of 4 pairs is 4 KiB, and a weight's columns, which come from the second-level cache, are 1 KiB of fp32: a
    program reads at most 3 KiB of weights with 4 KiB of features. Stages: 8 KiB in flight a program, of which by
    registers four fit a multiprocessor; with a fourth stage Triton 3.6 spills.
    """
    if dtype == torch.float64:
        return Config(2, 128, 2 if lanes == 64 else 4, 1 if lanes == 64 else 2)
    return Config(4, 256, 4 if lanes == 32 else 2, 3 if lanes == 32 else 2)


def finish_config(dtype: torch.dtype) -> Config:
    """(partials, columns of D, warps, stages) of the kernel that adds the partials: a step is 64 lines of 128 bytes
    (fp64: 32 of 256), which are whole cache lines, and 2 steps are in flight.
    """
    return Config(32 if dtype == torch.float64 else 64, 32, 4, 3)


def padded(dim: int) -> int:
    """D as a power of two, at least 128: four features a lane."""
    return max(128, 1 << (dim - 1).bit_length())


def step_config(dim: int, dtype: torch.dtype, lanes: int) -> Config:
    """(pairs, padded D, warps, stages) of the kernel that reads the features, on warps of `lanes` threads.

    Warps: 8 features of a row per thread (fp64, which is for checking: 4), so that a vector of D costs 8 registers; 16
    per thread at D = 8192 and 32 lanes, where more warps would leave 64 registers to a thread. Pairs: two if one pair's
    rows are at most 8 KiB in fp32. Stages: as many as the bytes in flight need, within 64 KiB of shared memory; fewer
    with 64 lanes (AMD), where the addresses of more stages run out of scalar registers.
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
    """Programs for each of `groups` groups of the pairs.

    All partial sums take at most 4 MiB a direction (256 programs at D = 4096, two for each of 132 multiprocessors).
    They stay in the second-level cache, and are small beside any features that take longer to read than a launch.
    """
    most = max(256, min(2048, 2**20 // padded(dim)))
    return max(1, min(most // groups, -(-pairs // (groups * LEAST_PAIRS))))
