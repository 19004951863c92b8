"""`ensemble_reward` on the native CPU library: one call of csrc/ensemble_reward.cpp each way."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from .contract import Grads, Inputs, Needs, OutputGrads, Outputs
from .spec import CENTRES, KINDS, NOMINALS, Aggregation


def available() -> bool:
    """True if the native library could be loaded; see `native.load`."""
    return native.load()


class NativeSpec(NamedTuple):
    """An aggregation as arguments of the native op: indices into the tables of spec.py, and numbers."""

    kind: int
    coefficient: float
    source_is_sample: bool
    nominal: int
    nominal_head: int
    centre: int
    of_batch: bool
    price: float  # -1: none
    price_from: float
    price_power: int


@lru_cache(maxsize=256)
def native_spec(aggregation: str) -> NativeSpec:
    """The aggregation string as arguments of the native op."""
    spec = Aggregation.parse(aggregation)
    return NativeSpec(
        kind=KINDS.index(spec.kind),
        coefficient=float(spec.coefficient),
        source_is_sample=spec.source == "sample",
        nominal=NOMINALS.index(spec.nominal.partition(":")[0]),
        nominal_head=spec.nominal_head,
        centre=CENTRES.index(spec.centre),
        of_batch=spec.of_batch,
        price=-1.0 if spec.trust is None else float(spec.trust),
        price_from=float(spec.trust_from),
        price_power=spec.trust_power,
    )


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    """The arguments that forward and backward share: `Inputs` with the aggregation as numbers at the end, and the
    instruction set.

    They are passed by position because keywords take a quarter more host time per call. test_native_build.py compares
    their order with the schemas.
    """
    return *inputs[:13], *inputs[14:], *native_spec(inputs.aggregation), native.isa_index()


@lru_cache(maxsize=2)
def _op(name: str) -> Any:
    return getattr(torch.ops.prudent_native, name).default


def forward(inputs: Inputs, keep: bool = False) -> Outputs:
    """(reward, mean, std, reward_sum, distance, saved), fp32. Raises RuntimeError outside the contract."""
    result: Outputs = _op("ensemble_reward_forward")(*_arguments(inputs), keep)
    return result


def backward(grads: OutputGrads, inputs: Inputs, saved: Tensor, needs: Needs) -> Grads:
    """Gradients of hidden, weight, bias and norm_weight (None if not needed) from the gradients of the outputs."""
    outer = (g if g is None or g.dtype == torch.float32 else g.float() for g in grads)
    result: Grads = _op("ensemble_reward_backward")(*outer, *_arguments(inputs), saved, *needs)
    return result
