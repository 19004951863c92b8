"""The static table of `ensemble_reward`'s Triton kernels: tiles by dtype and padded heads, and what each target can do.

Never keyed on timing or on a sequence length, so that equal calls on equal devices have equal bits. `shipped` walks
through every row of the table for tools that compile it ahead of time; `assume` stands in for a device there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch

from ..launch import Config

MAX_HEADS = 64  # beyond, a program's tiles spill registers; such calls run the reference on the device
SWEEP = 1024  # elements a lone program reads at a time where it totals or centres


class Platform(NamedTuple):
    """What `tl.dot` may be asked for. `fp32_dot`: the precision of fp32 operands whose storage was 16-bit."""

    bf16_halves: bool
    fp32_dot: str


_TARGETS = {
    "sm_80": Platform(True, "tf32x3"),
    "sm_90": Platform(True, "tf32x3"),
    "sm_100": Platform(True, "tf32x3"),
    "gfx942": Platform(True, "ieee"),  # fp32 matrix instructions and no tf32x3
}
_assumed: list[str] = []


@contextlib.contextmanager
def assume(target: str) -> Iterator[None]:
    """Inside the block every device is taken for `target`, one of sm_80, sm_90, sm_100, gfx942."""
    if target not in _TARGETS:
        raise ValueError(f"assume: target: expected one of {', '.join(_TARGETS)}, got {target!r}")
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()


def platform(device: torch.device) -> Platform:
    """NVIDIA below sm_80 has neither bf16 nor tf32 matrix instructions; a CPU is the interpreter, which is exact."""
    return _TARGETS[_assumed[-1]] if _assumed else _platform_of(device)


@cache
def _platform_of(device: torch.device) -> Platform:
    if device.type != "cuda" or torch.version.hip is not None:
        return Platform(True, "ieee")
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return Platform(modern, "tf32x3" if modern else "ieee")


# How much of D a program holds, by storage type and padded 2K: the widest that spills no register on sm_80 to sm_100
# and stays inside gfx942's 64 KiB of shared memory. Only the bf16 halves of the forward multiply 16-bit operands; every
# other product has fp32 ones, at twice the registers.
_PRODUCT_DIM = {
    torch.bfloat16: {16: 128, 32: 64, 64: 64, 128: 32},
    torch.float16: {16: 64, 32: 64, 64: 32, 128: 16},
    torch.float32: {16: 32, 32: 64, 64: 32, 128: 16},
    torch.float64: {16: 32, 32: 32, 64: 16, 128: 16},
}
_OUTER_DIM = {
    torch.bfloat16: {16: 128, 32: 64, 64: 32, 128: 16},
    torch.float16: {16: 128, 32: 64, 64: 32, 128: 16},
    torch.float32: {16: 64, 32: 64, 64: 32, 128: 16},
    torch.float64: {16: 32, 32: 32, 64: 16, 128: 16},
}


def padded_columns(num_heads: int) -> int:
    """2K, heads padded to a power of two: at least 16, the least `tl.dot` takes."""
    return max(16, 2 << (num_heads - 1).bit_length())


def product_config(num_rows: int, columns: int, dtype: torch.dtype) -> Config:
    """Tiles of the kernels that hold a [rows, 2K] product. Few rows or many heads: small blocks, more programs."""
    rows = 32 if num_rows > 4096 and columns == 16 and dtype.itemsize == 2 else 16
    warps = 8 if columns == 128 or (columns == 64 and dtype == torch.float64) else 4
    return Config(rows, _PRODUCT_DIM[dtype][columns], warps, 3 if dtype.itemsize == 2 else 2)


def outer_config(columns: int, dtype: torch.dtype) -> Config:
    """Tiles of the kernels that hold a [2K, D-block] sum."""
    widest = {2: 64, 4: 32, 8: 0}[dtype.itemsize]
    rows = 32 if columns <= widest else 16
    return Config(rows, _OUTER_DIM[dtype][columns], 8 if columns == 128 else 4, 2)


SMALL = Config(1, 1024, 4, 2)  # of the kernels without a product: scatter and centring

_HEADS = (5, 12, 20, 40)  # one of each padded width
_ROWS = (64, 5000)  # on both sides of the row-block boundary
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shipped(target: str, full: bool = True) -> Iterable[tuple[str, Callable[[], None]]]:
    """(label, run) for every configuration that `target` can be given: `run`, under `recording()`, launches a forward
    and a backward on tensors without data. Not `full`: bf16 with 5 heads, and one case of each other dtype and width.
    """
    for dtype, heads, rows in itertools.product(_DTYPES, _HEADS, _ROWS):
        short = (dtype == torch.bfloat16 and (heads == _HEADS[0] or rows == _ROWS[0])) or (heads, rows) == (5, 64)
        if full or short:
            label = f"{str(dtype).removeprefix('torch.')}-K{heads}-N{rows}"
            yield label, _run(target, dtype, heads, rows, "tradeoff:0.4,centre=batch")
    for label, spec, given in (
        ("group-by-size", "mean,centre=group", {"group_size": 8}),
        ("group-by-label", "mean,centre=group", {"group": torch.empty(64, dtype=torch.int64, device="meta")}),
    ):
        yield label, _run(target, torch.bfloat16, 5, 64, spec, **given)


def _run(
    target: str, dtype: torch.dtype, heads: int, rows: int, aggregation: str, **given: object
) -> Callable[[], None]:
    def run() -> None:
        from . import triton  # type: ignore[attr-defined]
        from .contract import Inputs

        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def empty(*shape: int, like: torch.dtype = wide) -> torch.Tensor:
            return torch.empty(shape, dtype=like, device="meta")

        values: dict[str, object] = {
            "hidden": empty(rows, 4096, like=dtype), "weight": empty(2 * heads, 4096), "bias": empty(2 * heads),
            "rows": empty(rows, like=torch.int64), "norm_weight": empty(4096, like=dtype),
            "seed": empty(1, like=torch.int64), "shift": empty(heads), "scale": empty(heads), "std_ref": empty(heads),
            "group": None, "group_size": 0, "norm_eps": 1e-6, "std_floor": 1e-3, "aggregation": aggregation,
        }  # fmt: skip
        inputs = Inputs(**{**values, **given})  # type: ignore[arg-type]
        grads = (empty(rows), empty(rows, heads), empty(rows, heads), empty())
        with assume(target):
            saved = triton.forward(inputs, True)[4]
            triton.backward(grads, inputs, saved, (True, True, True, True))

    return run
