"""`ensemble_reward` on the native CPU library: the contract's inputs unpacked into one call of C++ (csrc/)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import native
from .contract import Grads, Inputs, Outputs
from .spec import CENTRES, KINDS, NOMINALS, Aggregation


def available() -> bool:
    """True if the native library is there, loaded by the first call; `native.load` says what happens without."""
    return native.load()


@lru_cache(maxsize=256)
def _spec_numbers(aggregation: str) -> tuple[int, float, bool, int, int, int]:
    """kind, coefficient, takes samples, nominal, its fixed head, centre: the spec as it crosses into C++."""
    spec = Aggregation.parse(aggregation)
    nominal = NOMINALS.index(spec.nominal.partition(":")[0])
    return (
        KINDS.index(spec.kind),
        float(spec.coefficient),
        spec.source == "sample",
        nominal,
        spec.nominal_head,
        CENTRES.index(spec.centre),
    )


@lru_cache(maxsize=2)
def _op(name: str) -> Any:
    return getattr(torch.ops.prudent_native, name).default


def forward(inputs: Inputs, keep: bool = False) -> Outputs:
    """(reward [N], mean [N, K], std [N, K], reward_sum [], saved), fp32. Raises RuntimeError outside the contract."""
    numbers = _spec_numbers(inputs.aggregation)
    result: Outputs = _op("ensemble_reward_forward")(*inputs[:-1], *numbers, native.isa_index(), keep)
    return result


def backward(grads: Grads, inputs: Inputs, saved: Tensor, needs: tuple[bool, bool, bool, bool]) -> Grads:
    """Gradients of hidden, weight, bias and norm_weight (None where not needed) from those of the four outputs."""
    numbers = _spec_numbers(inputs.aggregation)
    outer = (g if g is None or g.dtype == torch.float32 else g.float() for g in grads)
    op = _op("ensemble_reward_backward")
    result: Grads = op(*outer, *inputs[:-1], *numbers, native.isa_index(), saved, *needs)
    return result
