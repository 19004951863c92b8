"""Chunk sizes of `linear_logprob`, computed from shapes and static budgets, and the tile of its Triton kernels.

Sizes never depend on timing, and no kernel is compiled for a sequence length, so equal calls on equal devices have
equal bits. README.md derives the numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import Config

MIB = 1 << 20
# A chunk of rows holds its hidden gradient in the accumulator's dtype and its gathered hidden states in the operand's:
# the budget is 4096 rows of 4096 16-bit features.
ROW_BYTES = 96 * MIB
# Each row chunk after the first rounds a 16-bit weight's gradient once more, so chunks are as large as ROW_BYTES
# allows, up to the size at which a tile of 32 MiB has 2048 columns.
MAX_ROWS = 4096
# A tile of logits. GPU: it fits an L2 cache of 40 MiB or more, between the product that writes it and the kernel that
# reads it. CPU: with its temporaries it fits a few cores' share of the last-level cache.
TILE_BYTES = {"gpu": 32 * MIB, "cpu": 4 * MIB}
# Each tile reads and writes the hidden gradient's accumulator, 8 bytes for 2 * columns operations an element: below 800
# columns, a GPU of 200 operations to the byte waits for memory.
MIN_COLUMNS = {"gpu": 1024, "cpu": 512}
# Without a weight's gradient row chunks need not be large. Fewer rows have wider tiles, so that the hidden gradient's
# accumulator is read and written less often.
NARROW_ROWS = 1024
# Slopes of several tiles, in the operands' dtype, are one operand of the backward's products: fewer passes over the
# hidden gradient's accumulator.
SLOPE_BYTES = {"gpu": 32 * MIB, "cpu": 0}
# Kept numerators have one peak a tile, so that these tiles must not depend on the number of rows.
KEPT_COLUMNS = {"gpu": 2048, "cpu": 512}
# A row of a tile lies in the registers of 512 threads, 16 fp32 or 8 fp64 values each; 16 fp64 values spill on sm_100.
MAX_ROW_BYTES = 32 * 1024


class Plan(NamedTuple):
    """Logits are made in tiles of at most [rows, columns]: for each chunk of rows, every chunk of the vocabulary.
    The backward multiplies the slopes of `tiles` tiles at once.
    """

    rows: int
    columns: int
    tiles: int = 1


def plan(
    num_rows: int,
    dim: int,
    vocabulary: int,
    operand: torch.dtype,
    accumulator: torch.dtype,
    device_kind: str,
    narrow: bool = False,
) -> Plan:
    """The tile of a call on a `device_kind`, "gpu" or "cpu". All row chunks of a call but the last are equal.

    `narrow`: no weight's gradient is computed, so a chunk has at most NARROW_ROWS on a GPU.
    """
    bytes_each = dim * (operand.itemsize + accumulator.itemsize)
    limit = max(128, min(MAX_ROWS, ROW_BYTES // bytes_each // 128 * 128))
    if narrow and device_kind == "gpu":
        limit = min(limit, NARROW_ROWS)
    chunks = max(1, -(-num_rows // limit))
    rows = max(16, -(-num_rows // (16 * chunks)) * 16)
    columns = _power_of_two(TILE_BYTES[device_kind] // (rows * accumulator.itemsize))
    columns = min(MAX_ROW_BYTES // accumulator.itemsize, max(MIN_COLUMNS[device_kind], columns))
    columns = min(columns, max(16, _power_of_two(2 * vocabulary - 1)))
    return Plan(rows, columns, max(1, SLOPE_BYTES[device_kind] // (rows * columns * operand.itemsize)))


def kept_columns(vocabulary: int, device_kind: str) -> int:
    """Columns of the tiles whose numerators are kept."""
    return min(KEPT_COLUMNS[device_kind], max(16, _power_of_two(2 * vocabulary - 1)))


def _power_of_two(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


WIDTHS = (1024, 2048, 4096, 8192)


def tile_config(columns: int) -> Config:
    """The launch shape of both Triton kernels, for a tile of up to 8192 columns.

    A program holds one row, 8 values a thread, 16 in the widest (two or four 16-byte loads in flight). There is no
    loop, so no stages. A narrower tile, such as the vocabulary's last, uses the least width and a mask, so that no
    other kernel is compiled.
    """
    block = next(width for width in WIDTHS if columns <= width)
    return Config(1, block, min(16, block // 256), 1)
