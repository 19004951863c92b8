"""How large the chunks of `linear_logprob` are, computed from shapes against static budgets, and the Triton table.

Never timed and never keyed on a sequence length in a kernel's signature, so equal calls on equal devices have equal
bits. README.md derives the numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import Config

MIB = 1 << 20
# A chunk of rows holds its hidden gradient in the accumulator's type and its gathered hidden states in the operand's:
# 4096 rows of 4096 16-bit features.
ROW_BYTES = 96 * MIB
# Each row chunk after the first rounds a 16-bit weight's gradient once more, so they are as large as ROW_BYTES lets
# them be, up to where a tile of 32 MiB has fewer than 2048 columns.
MAX_ROWS = 4096
# A tile of logits. GPU: stays in an L2 cache of 40 MiB or more between the product that writes it and the kernel that
# reads it. CPU: with its temporaries inside a few cores' share of the last cache.
TILE_BYTES = {"gpu": 32 * MIB, "cpu": 4 * MIB}
# The hidden gradient's accumulator is read and written once a tile, 8 bytes for 2 * columns operations an element: a
# GPU of 200 operations to the byte waits for memory below 800 columns.
MIN_COLUMNS = {"gpu": 1024, "cpu": 512}
# A row of a tile in 512 threads' registers, 16 fp32 or 8 fp64 values each; 16 fp64 values spill on sm_100.
MAX_ROW_BYTES = 32 * 1024


class Plan(NamedTuple):
    """Logits are made in tiles of at most [rows, columns]: for each chunk of rows, every chunk of the vocabulary."""

    rows: int
    columns: int


def plan(
    num_rows: int, dim: int, vocabulary: int, operand: torch.dtype, accumulator: torch.dtype, device_kind: str
) -> Plan:
    """The tile of a call on a `device_kind`, "gpu" or "cpu". Row chunks of one call are equal but for the last."""
    bytes_each = dim * (operand.itemsize + accumulator.itemsize)
    limit = max(128, min(MAX_ROWS, ROW_BYTES // bytes_each // 128 * 128))
    chunks = max(1, -(-num_rows // limit))
    rows = max(16, -(-num_rows // (16 * chunks)) * 16)
    columns = _power_of_two(TILE_BYTES[device_kind] // (rows * accumulator.itemsize))
    columns = min(MAX_ROW_BYTES // accumulator.itemsize, max(MIN_COLUMNS[device_kind], columns))
    return Plan(rows, min(columns, max(16, _power_of_two(2 * vocabulary - 1))))


def _power_of_two(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


WIDTHS = (1024, 2048, 4096, 8192)


def tile_config(columns: int) -> Config:
    """Of both Triton kernels, for a tile of up to 8192 columns: a program holds one row, 8 values a thread, 16 in the
    widest (two or four 16-byte loads in flight). No loop, so no stages. A narrower tile, as the vocabulary's last one
    may be, takes the least width and is masked, rather than one more compiled kernel.
    """
    block = next(width for width in WIDTHS if columns <= width)
    return Config(1, block, min(16, block // 256), 1)
