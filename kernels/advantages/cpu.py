"""`advantages` on the native CPU library: the contract's inputs unpacked into one call of C++ (csrc/advantages.cpp)."""

from __future__ import annotations

from typing import Any

import torch

from .. import native
from .contract import KL_ESTIMATORS, VARIANCE_EPS, WHITEN, Inputs, Outputs


def available() -> bool:
    """True if the native library is there, loaded by the first call; `native.load` says what happens without."""
    return native.load()


def forward(inputs: Inputs) -> Outputs:
    """(advantage, returns, reward [B, T], dropped [B], stats [6]); rows over threads, the recurrence in fp64."""
    decay = inputs.gamma * inputs.effective_lam
    native_op: Any = torch.ops.prudent_native.advantages.default
    result: Outputs = native_op(
        *inputs[:5],
        inputs.gamma,
        decay,
        1.0 if inputs.holes == "skip" else decay,
        inputs.kl_coef,
        KL_ESTIMATORS.index(inputs.kl_estimator),
        inputs.kl_clip,
        inputs.score_at == "after",
        WHITEN.index(inputs.whiten),
        VARIANCE_EPS,
    )
    return result
