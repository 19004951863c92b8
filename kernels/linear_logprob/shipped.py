"""Every Triton launch of `linear_logprob` that the table in configs.py can choose, on tensors without data.

bench/aot.py records these launches and compiles them ahead of time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch

from . import triton  # type: ignore[attr-defined]
from .configs import MAX_ROW_BYTES, WIDTHS
from .contract import Inputs

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shipped(target: str, full: bool = True) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield (label, run) for every configuration, the same for every `target`; unless `full`, only for the width of a
    full row chunk in each dtype and the widest of bf16.

    `run` launches the kernels of a first, a middle and a last tile on tensors without data, to be called under
    `recording()`.
    """
    for dtype, columns, softcap in itertools.product(_DTYPES, WIDTHS, (None, 30.0)):
        short = softcap is None and (columns == 2048 or (dtype, columns) == (torch.bfloat16, 8192))
        fits = columns * (8 if dtype == torch.float64 else 4) <= MAX_ROW_BYTES
        if short or (full and fits):
            label = f"{str(dtype).removeprefix('torch.')}-{columns} columns" + ("-softcap" if softcap else "")
            yield label, _run(dtype, columns, softcap)


def _run(dtype: torch.dtype, columns: int, softcap: float | None) -> Callable[[], None]:
    def run() -> None:
        def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=like, device="meta")

        rows, vocabulary = 4096, 128256
        inputs = Inputs(empty(rows, 4096), empty(vocabulary, 4096), empty(rows, like=torch.int64), 1.0, softcap, None)
        tiles = triton.TritonTiles(inputs, None)
        tile, state = empty(rows, columns, like=inputs.accumulator), empty(4, rows, like=inputs.accumulator)
        found = (empty(rows, like=inputs.accumulator),) * 3
        for start in (0, columns, vocabulary - columns):
            tiles.statistics(tile, inputs.target, start, state, found)
        tiles.gradient(tile, inputs.target, 0, found[0], found[0], found, dtype)

    return run
