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
from .torch_tiles import Emit, Kept, RowTerms

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shipped(target: str, full: bool = True) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield (label, run) for every configuration, the same for every `target`; unless `full`, only for the width of a
    full row chunk in each dtype and the widest of bf16.

    `run` launches the kernels of a call that keeps nothing, then of one that keeps the derivative and of one that keeps
    numerators, on tensors without data, to be called under `recording()`.
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
        inputs = Inputs(empty(rows, 4096), empty(vocabulary, 4096), empty(rows, like=torch.int64), 1.0, softcap, -100)
        tiles, acc = triton.TritonTiles(inputs, None), inputs.accumulator
        tile, state, of_rows = empty(rows, columns, like=acc), empty(4, rows, like=acc), empty(rows, like=acc)
        powers = empty(rows, columns)
        for column in (0, columns):
            for emit in (None, Emit(powers, of_rows, derivative=True), Emit(powers, of_rows, derivative=False)):
                tiles.statistics(tile, inputs.target, column, 0, state, emit)
        terms = RowTerms(of_rows, of_rows, of_rows, of_rows, of_rows)
        for source in (tile, Kept(powers, of_rows, of_rows)):
            tiles.gradient(source, inputs.target, 0, 0, terms, powers)

    return run
