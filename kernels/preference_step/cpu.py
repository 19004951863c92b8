"""`preference_step` on the native CPU library: the contract's inputs unpacked into one call of C++ (csrc/)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from .contract import Inputs, Outputs


def available() -> bool:
    """True if the native library is there, loaded by the first call; `native.load` says what happens without."""
    return native.load()


def step(inputs: Inputs) -> Outputs:
    """(loss [], dweight [2K, D], dbias [2K], accuracy [], std []), fp32 but for a 16-bit weight's gradient."""
    op: Any = torch.ops.prudent_native.preference_step.default
    numbers = (inputs.alpha, inputs.bsr, inputs.centre, inputs.std_floor)
    loss, dweight, dbias, accuracy, std = op(*inputs[:8], inputs.loss == "brme", *numbers, native.isa_index())
    result: tuple[Tensor, ...] = (loss, dweight.to(inputs.weight.dtype), dbias, accuracy, std)
    return result  # type: ignore[return-value]
