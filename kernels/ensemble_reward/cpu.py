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


def forward(inputs: Inputs, keep: bool = False) -> Outputs:
    """(reward [N], mean [N, K], std [N, K], reward_sum [], saved), fp32."""
    isa = native.isa_index()
    op: Any = torch.ops.prudent_native.ensemble_reward_forward.default
    result: tuple[Tensor, Tensor, Tensor, Tensor] = op(*inputs[:-1], *_spec_numbers(inputs.aggregation), isa)
    saved = result[1].new_zeros(inputs.num_rows if keep else 0, 2 * inputs.num_heads + 1)
    return *result, saved


def backward(grads: Grads, inputs: Inputs, saved: Tensor, needs: tuple[bool, bool, bool, bool]) -> Grads:
    """Gradients of hidden, weight, bias and norm_weight (None where not needed) from those of the four outputs."""
    isa = native.isa_index()
    op: Any = torch.ops.prudent_native.ensemble_reward_backward.default
    outer = (g if g is None or g.dtype == torch.float32 else g.float() for g in grads)
    result: Grads = op(*outer, *inputs[:-1], *_spec_numbers(inputs.aggregation), isa, *needs)
    return result
