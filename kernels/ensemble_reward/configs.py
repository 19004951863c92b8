"""The static table of `ensemble_reward`'s Triton kernels: tiles by shape, dtype and architecture, each with its reason.

A tile never depends on timing (except with PRUDENT_AUTOTUNE=1) or on a sequence length, so that equal calls on equal
devices have equal bits. `assume` replaces the device when launches are compiled ahead of time (shipped.py).

How the tiles are chosen. Reading the features is the whole cost: 2K = 10 products of D = 4096 bf16 values are 10 FLOP a
byte, and arithmetic limits a current GPU only from about 200. So a tile is judged by its bytes in flight: by Little's
law each multiprocessor needs bandwidth x latency / multiprocessors of them, which is 4.8 TB/s x 0.8 us / 132 = 29 KB on
an H200 (8 TB/s and 148 multiprocessors: 43 KB on a B200; 2 TB/s and 108: 15 KB on an A100). A program has (num_stages -
1) tiles of block_rows x block_dim features in flight; how many programs fit a multiprocessor follows from the registers
and shared memory of the machine code (`prudent bench --aot`). The bandwidths are from data sheets: nothing here was
timed on a GPU.

The weight comes second: every row block reads all of [2K, D] again from L2, in fp32 2K * D * 4 bytes, beside
block_rows * D * 2 bytes of bf16 features. With K = 5 the ratio is 20 / block_rows: 1.25 at 16 rows, 0.31 at 64, 0.16 at
128 (half of that for a bf16 weight). So blocks are large if there are enough rows; else D is split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from ..arrivals import architecture, stores_done
from ..launch import Config
from .contract import Inputs

# the most columns of a product: 2K heads and R directions, each padded. With more, a program's tiles spill registers;
# such calls run the reference on the device
MAX_COLUMNS = 128
MAX_HEADS = MAX_COLUMNS // 2

# The last program centres what no program can centre earlier. A sweep takes one L2 latency whatever its width, so it is
# as wide as possible without raising the kernel's number of registers: 32 values for each of 128 threads.
SWEEP = 4096

# Centring by label in the forward compares N rows with every label up to the largest, on one multiprocessor: at most a
# million comparisons at N = 1024, an eighth of that with labels 0 .. N / 8. That grows as N^2; a sort and a second
# launch do not.
MAX_LABELLED_ROWS = 1024

# The least columns of a part of D: 4 tiles of 64, which a program can have in flight at once.
SPLIT_COLUMNS = 256
# The most parts of D, because one program adds them with unrolled loads: two registers a part, and eight or more with
# the wide tiles of 8 warps, for which the second limit holds.
MAX_SPLITS, MAX_WIDE_SPLITS = 16, 4
# D is split only while there are no more row blocks than multiprocessors; each such block has an arrival counter.
MAX_SPLIT_BLOCKS = 304

# The most partial sums [2K, D] of the weight's gradient: at D = 4096 and K = 5 they take 10 MB, written and read once,
# beside the gigabyte that a backward over 65536 rows reads and writes.
MAX_SHARES = 64


class Platform(NamedTuple):
    """What the tiles depend on: the precisions of `tl.dot`, and the number of multiprocessors.

    `fp32_dot`: the precision for fp32 operands that come from 16-bit storage. `multiprocessors`: the number on the
    architecture's usual device, not on this one, so that all devices of one architecture give equal bits.
    `stores_done`: of arrivals.py.
    """

    name: str
    bf16_halves: bool
    fp32_dot: str
    multiprocessors: int
    stores_done: str = ""


_TARGETS = {
    "sm_80": Platform("sm_80", True, "tf32x3", 108),
    "sm_90": Platform("sm_90", True, "tf32x3", 132),
    "sm_100": Platform("sm_100", True, "tf32x3", 148),
    # fp32 matrix instructions and no tf32x3
    "gfx942": Platform("gfx942", True, "ieee", 304, stores_done("gfx942")),
}
_INTERPRETER = Platform("interpreter", True, "ieee", 4)
_assumed: list[str] = []


@contextlib.contextmanager
def assume(target: str) -> Iterator[None]:
    """Inside the block, treat every device as `target`: sm_80, sm_90, sm_100 or gfx942."""
    if target not in _TARGETS:
        raise ValueError(f"assume: target: expected one of {', '.join(_TARGETS)}, got {target!r}")
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()


def platform(device: torch.device) -> Platform:
    """The platform of `device`. NVIDIA below sm_80 has no bf16 or tf32 matrix products; a CPU is the interpreter."""
    return _TARGETS[_assumed[-1]] if _assumed else _platform_of(device)


@cache
def _platform_of(device: torch.device) -> Platform:
    if device.type != "cuda":
        return _INTERPRETER
    if torch.version.hip is not None:
        return _TARGETS["gfx942"]._replace(stores_done=stores_done(architecture(device)))
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8:
        return Platform("sm_70", False, "ieee", 80)
    return _TARGETS["sm_80" if major == 8 else "sm_90" if major == 9 else "sm_100"]


class Row(NamedTuple):
    """The tile, block_rows of N by block_dim of D, for calls of at most `rows` scored rows.

    `limits`: for sm_90, the most registers a thread, chosen such that Triton 3.6 and 3.9 spill nothing; the first is
    the default, the others are candidates of PRUDENT_AUTOTUNE=1.
    """

    rows: float
    config: Config
    limits: tuple[int, ...] = ()


_ANY = float("inf")
_BF16, _FP16, _FP32, _FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# The forward, by storage type and padded 2K.
_FORWARD: dict[tuple[torch.dtype, int], tuple[Row, ...]] = {
    (_BF16, 16): (
        # 256 last tokens of 4096 features: 16 blocks x 16 parts = 256 programs, each with all its 8 KB (4 tiles) in
        # flight at once. In all that is 2 MB, half of what 132 multiprocessors could have in flight: latency dominates.
        # Two programs a multiprocessor are all that there are, so registers are free; unasked, Triton 3.6 stops at 72
        # and spills two words. 128: 4 programs fit; 96: 5.
        Row(1024, Config(16, 64, 4, 5), (128, 96)),
        # 24 KB a program, at 128 registers 4 programs a multiprocessor of sm_90: three times what Little's law asks
        # (unasked, 125 by Triton 3.9, but 139 and 3 programs by 3.6). Weight traffic is 0.31 of the features. With
        # fewer row blocks than multiprocessors D is split: 4096 rows are 64 blocks x 4 parts.
        Row(32768, Config(64, 64, 4, 4), (128, 112)),
        # 32 KB a program, at 64 registers 4 programs a multiprocessor of sm_90, at 80 3. Unasked, Triton 3.6 takes 87:
        # a warp gets registers by 256, so a program of 8 warps takes 22528 of 65536, and 2 fit (threads would allow 8,
        # shared memory 4). Weight traffic is 0.16 of the features. 65536 rows are 512 programs, one wave of 528.
        Row(_ANY, Config(128, 64, 8, 3), (64, 80)),
    ),
    # the weight of 12 heads is 0.75 of the features at 64 rows; with 128 rows a multiprocessor would hold 2 programs
    (_BF16, 32): (Row(1024, Config(16, 64, 4, 4)), Row(_ANY, Config(64, 64, 4, 3))),
    # half the columns: 64 x 64 with 3 stages exceeds 64 KB of shared memory by 256 bytes
    (_BF16, 64): (Row(1024, Config(16, 64, 4, 3)), Row(_ANY, Config(64, 32, 4, 4))),
    # bound by the weight's tiles and products, no longer by the features
    (_BF16, 128): (Row(_ANY, Config(16, 32, 8, 3)),),
    # 16-bit features times an fp32 weight in three tf32 products: operands at twice the registers, so half the columns
    (_FP16, 16): (Row(1024, Config(16, 64, 4, 4)), Row(_ANY, Config(64, 32, 4, 4))),
    (_FP16, 32): (Row(_ANY, Config(16, 64, 4, 3)),),
    (_FP16, 64): (Row(_ANY, Config(16, 32, 4, 3)),),
    (_FP16, 128): (Row(_ANY, Config(16, 16, 8, 3)),),
    # exact fp32 products without matrix instructions: a whole operand tile is in registers, and 64 rows of it spill
    (_FP32, 16): (Row(1024, Config(16, 32, 4, 3)), Row(_ANY, Config(32, 32, 4, 3))),
    (_FP32, 32): (Row(_ANY, Config(16, 64, 4, 2)),),
    (_FP32, 64): (Row(_ANY, Config(16, 32, 4, 2)),),
    (_FP32, 128): (Row(_ANY, Config(16, 16, 8, 2)),),
    # for checking, not for speed
    (_FP64, 16): (Row(_ANY, Config(16, 32, 4, 2)),),
    (_FP64, 32): (Row(_ANY, Config(16, 32, 4, 2)),),
    (_FP64, 64): (Row(_ANY, Config(16, 16, 8, 2)),),
    (_FP64, 128): (Row(_ANY, Config(16, 16, 8, 2)),),
}

# The forward with a trust region's R directions, by storage type and padded 2K + R. Each block of rows reads R more
# rows from L2, in fp32, and keeps their products, so tiles are half as wide: with K = 5 and R = 32, 16 x 64 spills.
_DIRECTED: dict[tuple[torch.dtype, int], tuple[Row, ...]] = {
    (_BF16, 32): (Row(1024, Config(16, 32, 4, 4)), Row(_ANY, Config(64, 32, 4, 4))),
    # the directions are 1.3 times the features at 64 rows, half of that at 128
    (_BF16, 64): (
        Row(1024, Config(16, 32, 4, 4)),
        Row(32768, Config(64, 32, 4, 4)),
        Row(_ANY, Config(128, 32, 8, 4)),
    ),
    (_BF16, 128): (Row(_ANY, Config(16, 32, 8, 3)),),
    (_FP16, 32): (Row(_ANY, Config(16, 32, 4, 3)),),
    (_FP16, 64): (Row(_ANY, Config(16, 16, 4, 3)),),
    (_FP16, 128): (Row(_ANY, Config(16, 16, 8, 3)),),
    (_FP32, 32): (Row(_ANY, Config(16, 32, 4, 2)),),
    (_FP32, 64): (Row(_ANY, Config(16, 32, 4, 2)),),
    (_FP32, 128): (Row(_ANY, Config(16, 16, 8, 2)),),
    (_FP64, 32): (Row(_ANY, Config(16, 16, 8, 2)),),
    (_FP64, 64): (Row(_ANY, Config(16, 16, 8, 2)),),
    (_FP64, 128): (Row(_ANY, Config(16, 16, 8, 2)),),
}

# The outer products of the backward: a program keeps the weight of block_dim columns and the sum of its gradient in
# registers, and reads block_rows rows at a time.
_OUTER: dict[tuple[torch.dtype, int], Config] = {
    # 256 contiguous bytes a row; 106 registers: 4 programs a multiprocessor, 3 tiles of 4 KB each: 48 KB in flight
    (_BF16, 16): Config(16, 128, 4, 4),
    (_BF16, 32): Config(16, 64, 4, 4),
    (_BF16, 64): Config(16, 32, 4, 4),
    (_BF16, 128): Config(16, 16, 8, 3),
    # the rest have fp32 operands, three tf32 products from fp16: the widest tiles that do not spill
    (_FP16, 16): Config(32, 128, 4, 2),
    (_FP16, 32): Config(32, 64, 4, 2),
    (_FP16, 64): Config(32, 32, 4, 2),
    (_FP16, 128): Config(16, 16, 8, 2),
    (_FP32, 16): Config(32, 64, 4, 2),
    (_FP32, 32): Config(16, 64, 4, 2),
    (_FP32, 64): Config(16, 32, 4, 2),
    (_FP32, 128): Config(16, 16, 8, 2),
    (_FP64, 16): Config(16, 32, 4, 2),
    (_FP64, 32): Config(16, 32, 4, 2),
    (_FP64, 64): Config(16, 16, 4, 2),
    (_FP64, 128): Config(16, 16, 8, 2),
}

# The same on sm_90, without the distance's gradient: 32 rows a step halve its waits and barriers. Unasked they take 174
# registers, 2 programs a multiprocessor; at 168, without spills by Triton 3.6 and 3.9, 3 programs: 72 KB in flight.
_OUTER_SM_90: dict[tuple[torch.dtype, int], Config] = {(_BF16, 16): Config(32, 128, 4, 4, 168)}

# The same with the distance's gradient, where the table above by all columns is not the best: 64 columns of D and
# not 32 halve how often each row's 2K + R numbers come from L2, in fewer registers on gfx942.
_OUTER_MEASURED: dict[tuple[torch.dtype, int], Config] = {(_BF16, 64): Config(16, 64, 4, 4)}

# Centring by label, one program per group: 1024 members at a time.
CENTRE = Config(1, 1024, 4, 1)


def padded_columns(num_heads: int) -> int:
    """2K, heads padded to a power of two: at least 16, the least `tl.dot` takes."""
    return max(16, 2 << (num_heads - 1).bit_length())


def num_directions(inputs: Inputs) -> int:
    """R; 0 without a trust region."""
    return 0 if inputs.trust_directions is None else inputs.trust_directions.shape[0]


def padded_directions(directions: int) -> int:
    """R padded to a power of two: at least 16, the least `tl.dot` takes."""
    return max(16, 1 << (directions - 1).bit_length()) if directions else 16


class Columns(NamedTuple):
    """The columns by which the tables choose a tile: `heads`, padded 2K, and with `directions`, padded R (0 without
    any) all of them, padded again. `limited`: whether the table's limits of registers hold; with a trust region, or
    groups to centre, the forward would spill.
    """

    heads: int
    directions: int = 0
    limited: bool = True

    @property
    def all(self) -> int:
        return 1 << (self.heads + self.directions - 1).bit_length()

    def forward(self, dtype: torch.dtype) -> tuple[Row, ...]:
        """The rows of the forward's table."""
        return (_DIRECTED if self.directions else _FORWARD)[dtype, self.all]


def columns_of(inputs: Inputs) -> Columns:
    directions = num_directions(inputs)
    limited = inputs.trust is None and inputs.spec.centre != "group"
    return Columns(padded_columns(inputs.num_heads), padded_directions(directions) if directions else 0, limited)


def fits(inputs: Inputs) -> bool:
    """Whether the kernels' tiles hold the call's heads and directions."""
    return columns_of(inputs).all <= MAX_COLUMNS


def forward_config(num_rows: int, columns: Columns, dtype: torch.dtype, target: str) -> Config:
    """The forward's tile for N rows on the platform named `target`."""
    row = next(row for row in columns.forward(dtype) if num_rows <= row.rows)
    return _compilable(row.config, target)._replace(maxnreg=next(iter(_limits(row, columns, target)), None))


def _limits(row: Row, columns: Columns, target: str) -> tuple[int, ...]:
    """The limits of registers among which to choose; none on other targets, for which none was compiled."""
    return row.limits if target == "sm_90" and columns.limited else ()


def _compilable(config: Config, target: str) -> Config:
    """`config`, or a smaller one that Triton below 3.8 can compile.

    On sm_100 a product of 64 rows or more lies in tensor memory, where the layout pass of 3.6.0 and 3.7.1 fails on this
    kernel; on gfx942 the pipeliner of 3.5.1 and 3.6.0 fails at 4 stages.
    """
    if target == "sm_100" and config.block_rows > 32 and _triton_version() < (3, 8):
        return config._replace(block_rows=32, num_warps=4)
    if target == "gfx942" and config.num_stages > 3 and _triton_version() < (3, 8):
        return config._replace(num_stages=3)
    return config


@cache
def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def forward_candidates(columns: Columns, dtype: torch.dtype, target: str) -> tuple[Config, ...]:
    """The candidates of PRUDENT_AUTOTUNE=1: the tiles of every row bucket, with their stages and with fewer, and with
    each limit of registers and without any.
    """
    found: list[Config] = []
    for row in columns.forward(dtype):
        tile, limits = _compilable(row.config, target), _limits(row, columns, target)
        first = tile._replace(maxnreg=next(iter(limits), None))
        found += [first._replace(num_stages=stages) for stages in range(2, tile.num_stages + 1)]
        found += [tile._replace(maxnreg=limit) for limit in (*limits[1:], None)]
    return tuple(dict.fromkeys(found))


def bucket(num_rows: int, columns: Columns, d: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The key of a PRUDENT_AUTOTUNE=1 choice: the table's bucket of rows, and the shapes that a model fixes."""
    rows = next(row.rows for row in columns.forward(dtype) if num_rows <= row.rows)
    directions = (f"directions={columns.directions}",) if columns.directions else ()
    limited = () if columns.limited else ("unlimited",)
    return f"rows<={rows}", f"columns={columns.heads}", *directions, *limited, f"D={d}", str(dtype)


def splits(programs: int, d: int, config: Config, device: torch.device) -> tuple[int, int]:
    """(number of parts of D for each of `programs` row blocks, blocks of columns in a part).

    The number is the largest power of two with at most two programs a multiprocessor and at least SPLIT_COLUMNS a part.
    """
    most = MAX_SPLITS if config.num_warps < 8 else MAX_WIDE_SPLITS
    room = min(2 * platform(device).multiprocessors // programs, d // SPLIT_COLUMNS, most)
    if room < 2:
        return 1, 0
    parts = 1 << (room.bit_length() - 1)
    return parts, -(-d // (parts * config.block_dim))


def sweep(num_rows: int) -> int:
    """The number of elements that the last program centres at a time: a power of two between 1024 and SWEEP."""
    return int(min(SWEEP, max(1024, 1 << (num_rows - 1).bit_length())))


def outer_config(columns: Columns, dtype: torch.dtype, target: str, measured: bool = False) -> Config:
    """The tile of the backward's outer products on the platform named `target`; `measured`: with the distance's
    gradient, for which 16 columns are too few to choose by.
    """
    if not measured:
        table = _OUTER_SM_90 if target == "sm_90" else {}
        return table.get((dtype, columns.heads), _OUTER[dtype, columns.heads])
    return _OUTER_MEASURED.get((dtype, columns.all), _OUTER[dtype, max(32, columns.all)])


@cache
def outer_candidates(columns: Columns, dtype: torch.dtype, target: str, measured: bool = False) -> tuple[Config, ...]:
    """The candidates of PRUDENT_AUTOTUNE=1: the table's tile, the other architectures', and half of its columns, with
    its stages and with fewer.
    """
    tiles = [outer_config(columns, dtype, name, measured) for name in (target, "")]
    narrow = tiles[1]._replace(block_dim=max(16, tiles[1].block_dim // 2))
    return tuple(dict.fromkeys(t._replace(num_stages=s) for t in (*tiles, narrow) for s in range(2, t.num_stages + 1)))


def row_shares(num_rows: int, d: int, config: Config, device: torch.device) -> tuple[int, int]:
    """(row blocks in a share, number of shares): one wave, of as many programs a multiprocessor as the limit of
    registers lets in; four without a limit.
    """
    blocks = -(-num_rows // config.block_rows)
    programs = 65536 // (32 * config.num_warps * config.maxnreg) if config.maxnreg else 4
    wanted = max(1, min(MAX_SHARES, programs * platform(device).multiprocessors // -(-d // config.block_dim)))
    each = -(-blocks // wanted)
    return each, -(-blocks // each)


def gradient_config(columns: int) -> Config:
    """The tile of the kernels on [N, 2K]: 1024 values a program, 8 a thread (the widest: 2048, twice the threads)."""
    return Config(max(16, 1024 // columns), 0, 8 if columns == 128 else 4, 1)


def weight_config(columns: int) -> Config:
    """The tile for the sum of the weight's partials: narrow, to have many programs (128 at D = 4096)."""
    return Config(0, max(16, 512 // columns), 4, 1)
