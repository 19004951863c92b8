"""Every Triton launch of `advantages` that the table in configs.py can choose, on tensors without data.

bench/aot.py records these launches and compiles them ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from . import triton  # type: ignore[attr-defined]
from .contract import Inputs


def shipped(target: str, full: bool = True) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield (label, run) for every configuration that `target` can get; only for fp32 unless `full`.

    `run` launches the op on tensors without data, to be called under `recording()`.
    """
    for length in (512, 4096):
        yield f"fp32-T{length}", _run(target, torch.float32, length, "k3", "after", True)
    if full:
        yield "bf16-T4096", _run(target, torch.bfloat16, 4096, "k3", "after", True)
        yield "fp64-T4096", _run(target, torch.float64, 4096, "k3", "after", True)
        yield "no-critic-k1-T4096", _run(target, torch.float32, 4096, "k1", "last", False)


def _run(
    target: str, dtype: torch.dtype, length: int, estimator: str, score_at: str, critic: bool
) -> Callable[[], None]:
    def run() -> None:
        tokens = torch.empty(64, length, dtype=dtype, device="meta")
        score, mask = tokens[:, 0], torch.empty(64, length, dtype=torch.bool, device="meta")
        value = tokens if critic else None
        inputs = Inputs(
            score=score, logprob=tokens, ref_logprob=tokens, value=value, mask=mask, gamma=1.0, lam=0.95, kl_coef=0.05,
            kl_estimator=estimator, kl_clip=10.0, holes="skip", score_at=score_at, whiten="sample",
        )  # fmt: skip
        triton.forward(inputs, target)

    return run
