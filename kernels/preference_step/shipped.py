"""Every Triton launch of `preference_step` that the table in configs.py can choose, on tensors without data.

bench/aot.py records these launches and compiles them ahead of time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import triton  # type: ignore[attr-defined]
from .contract import Inputs

_OPTIONS: dict[str, dict[str, Any]] = {
    "bt": {"loss": "bt"},
    "bt-bsr-centre": {"loss": "bt", "bsr": 0.1, "centre": 0.1},
    "brme": {"loss": "brme"},
    "brme-bsr": {"loss": "brme", "bsr": 0.1},
    "brme-sampled-bsr-centre": {"loss": "brme", "bsr": 0.1, "centre": 0.1, "sampled": True},
}
# one for each padded width, and wider ones, of which eq. 8 reads 5120 and 8192 twice; 576 is an odd multiple of 64
_DIMS = (4096, 64, 200, 512, 576, 2048, 5120, 8192, 16384)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shipped(target: str, full: bool = True) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield (label, run) for every configuration that `target` can get; unless `full`, only for bf16 and fp32 at D =
    4096, 576 and 8192.

    `run` launches a step of 512 gathered pairs and 5 heads on tensors without data, to be called under `recording()`.
    """
    lanes = 64 if target.startswith("gfx") else 32
    for dtype, dim, name in itertools.product(_DTYPES, _DIMS, _OPTIONS):
        short = dtype in (torch.bfloat16, torch.float32) and dim in (4096, 576, 8192)
        if full or short:
            yield f"{str(dtype).removeprefix('torch.')}-D{dim}-{name}", _run(lanes, dtype, dim, **_OPTIONS[name])


def _run(
    lanes: int, dtype: torch.dtype, dim: int, loss: str, bsr: float = 0.0, centre: float = 0.0, sampled: bool = False
) -> Callable[[], None]:
    def run() -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        pairs, heads, brme = 512, 5, loss == "brme"

        def empty(*shape: int, like: torch.dtype = wide) -> torch.Tensor:
            return torch.empty(shape, dtype=like, device="meta")

        triton.step(Inputs(
            features=empty(2 * pairs, dim, like=dtype), weight=empty(2 * heads, dim), bias=empty(2 * heads),
            rows=empty(2 * pairs, like=torch.int64), head_id=empty(pairs, like=torch.int64) if brme else None,
            p_hat=empty(pairs) if brme else None, margin=None if brme else empty(pairs),
            seed=empty(1, like=torch.int64) if sampled else None,
            loss=loss, alpha=4.0, bsr=bsr, centre=centre, std_floor=1e-3,
        ), lanes)  # fmt: skip

    return run
