"""Every Triton launch of `ensemble_reward` that the table in configs.py can choose, on tensors without data.

bench/aot.py records these launches and compiles them ahead of time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch

from . import triton  # type: ignore[attr-defined]
from .configs import assume
from .contract import Inputs, Needs, OutputGrads

_HEADS = (5, 12, 20, 40)  # one for each padded width
_RANKS = (0, 32, 8, 64)  # directions of a trust region, the common ones first
_ROWS = (256, 8192, 65536)  # one for each row bucket: D in 16 parts, in 2 parts, whole
SHOWN = ("bfloat16-K5-R0-N65536", "bfloat16-K5-R32-N65536")  # in the README's table, beside each kernel's first case
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shipped(target: str, full: bool = True) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield (label, run) for every configuration that `target` can get; unless `full`, only for bf16 with 5 heads and
    one case of each other dtype and width.

    `run` launches a forward and a backward on tensors without data, to be called under `recording()`.
    """
    for dtype, heads, rows in itertools.product(_DTYPES, _HEADS, _ROWS):
        short = (dtype == torch.bfloat16 and (heads == _HEADS[0] or rows == _ROWS[0])) or (heads, rows) == (5, 256)
        if full or short:
            label = f"{str(dtype).removeprefix('torch.')}-K{heads}-N{rows}"
            yield label, _run(target, dtype, heads, rows, "tradeoff:0.4,centre=batch")
    for dtype, rank, rows in itertools.product(_DTYPES, _RANKS, _ROWS):
        if full or (dtype == torch.bfloat16 and rank in _RANKS[:2]) or (rank, rows) == (_RANKS[1], _ROWS[0]):
            label = f"{str(dtype).removeprefix('torch.')}-K5-R{rank}-N{rows}"
            yield label, _run(target, dtype, 5, rows, "tradeoff:0.4,trust=1,centre=batch", rank)
    grouped = "tradeoff:0.4,centre=group"
    for label, rows, spec, given in (
        ("group-in-block", 256, grouped, {"group_size": 8}),
        ("group-by-size", 240, grouped, {"group_size": 24}),
        ("group-by-label", 256, grouped, {"group": torch.empty(256, dtype=torch.int64, device="meta")}),
        ("group-by-label-later", 2048, grouped, {"group": torch.empty(2048, dtype=torch.int64, device="meta")}),
        ("no-norm-bf16-weight", 65536, "tradeoff:0.4", {"norm_weight": None, "weight_dtype": torch.bfloat16}),
        ("no-norm-R32", 65536, "trust:1,centre=batch", {"norm_weight": None, "rank": 32}),
        ("batch-worst", 256, "batch_worst,centre=batch", {}),
    ):
        yield label, _run(target, torch.bfloat16, 5, rows, spec, **given)


def _run(
    target: str, dtype: torch.dtype, heads: int, num_rows: int, aggregation: str, rank: int | None = None,
    weight_dtype: torch.dtype | None = None, **given: object,
) -> Callable[[], None]:  # fmt: skip
    def run() -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def empty(*shape: int, like: torch.dtype = wide) -> torch.Tensor:
            return torch.empty(shape, dtype=like, device="meta")

        values: dict[str, object] = {
            "hidden": empty(num_rows, 4096, like=dtype), "weight": empty(2 * heads, 4096, like=weight_dtype or wide),
            "bias": empty(2 * heads), "rows": empty(num_rows, like=torch.int64) if num_rows < _ROWS[-1] else None,
            "norm_weight": empty(4096, like=dtype), "seed": empty(1, like=torch.int64), "shift": empty(heads),
            "scale": empty(heads), "std_ref": empty(heads), "group": None, "group_size": 0, "norm_eps": 1e-6,
            "std_floor": 1e-3, "aggregation": aggregation,
        }  # fmt: skip
        if rank is not None:
            values |= {"trust_mean": empty(4096), "trust_precision": empty(4096),
                       "trust_directions": empty(rank, 4096), "trust_weights": empty(rank),
                       "trust_unit": empty(1), "trust_rms": empty(1)}  # fmt: skip
        inputs = Inputs(**{**values, **given})  # type: ignore[arg-type]
        distance = None if rank is None else empty(num_rows)
        grads = OutputGrads(empty(num_rows), empty(num_rows, heads), empty(num_rows, heads), empty(), distance)
        needs = Needs(hidden=True, weight=True, bias=True, norm_weight=True)
        with assume(target):
            saved = triton.forward(inputs, True)[-1]
            triton.backward(grads, inputs, saved, needs)

    return run
