"""`advantages` on the native CPU library: one call of csrc/advantages.cpp."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import native
from .contract import KL_ESTIMATORS, VARIANCE_EPS, WHITEN, Inputs, Outputs


def available() -> bool:
    """True if the native library could be loaded; see `native.load`."""
    return native.load()


class NativeOptions(NamedTuple):
    """The native op's arguments after the tensors, in its schema's order (test_native_build.py compares the names)."""

    gamma: float
    decay: float
    hole: float
    kl_coef: float
    kl_estimator: int
    kl_clip: float
    after: bool
    whiten: int
    eps: float


def forward(inputs: Inputs) -> Outputs:
    """(advantage, returns, reward [B, T], dropped [B], stats [6]). Threads share the rows; recurrence in fp64."""
    decay = inputs.gamma * inputs.effective_lam
    options = NativeOptions(
        gamma=inputs.gamma,
        decay=decay,
        hole=1.0 if inputs.holes == "skip" else decay,
        kl_coef=inputs.kl_coef,
        kl_estimator=KL_ESTIMATORS.index(inputs.kl_estimator),
        kl_clip=inputs.kl_clip,
        after=inputs.score_at == "after",
        whiten=WHITEN.index(inputs.whiten),
        eps=VARIANCE_EPS,
    )
    native_op: Any = torch.ops.prudent_native.advantages.default
    result: Outputs = native_op(*inputs.tensors, *options)
    return result
