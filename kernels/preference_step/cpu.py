"""`preference_step` on the native CPU library: one call of csrc/preference_step.cpp."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import native
from .contract import Inputs, Outputs


def available() -> bool:
    """True if the native library could be loaded; see `native.load`."""
    return native.load()


class NativeOptions(NamedTuple):
    """The native op's arguments after the tensors, in its schema's order (test_native_build.py compares the names)."""

    brme: bool
    alpha: float
    bsr: float
    centre: float
    std_floor: float
    isa: int


def step(inputs: Inputs) -> Outputs:
    """(loss [], dweight [2K, D], dbias [2K], accuracy [], std []), fp32 except a 16-bit weight's gradient."""
    op: Any = torch.ops.prudent_native.preference_step.default
    options = NativeOptions(
        brme=inputs.loss == "brme", alpha=inputs.alpha, bsr=inputs.bsr, centre=inputs.centre,
        std_floor=inputs.std_floor, isa=native.isa_index(),
    )  # fmt: skip
    loss, dweight, dbias, accuracy, std = op(*inputs.tensors, *options)
    return loss, dweight.to(inputs.weight.dtype), dbias, accuracy, std
