"""Inputs, outputs and argument checks of `linear_logprob`.

The fields of `Inputs` are the registered op's schema, in order. Each backend offers
    scored_rows(inputs) -> rows: the positions [R] of the flattened target that are computed, or None for all
    forward(inputs, rows, keep, group) -> Results
    backward(grads, inputs, rows, saved, needs, group) -> (grad_hidden, grad_weight, grad_bias)
with grads = OutputGrads, saved = Saved and needs = Needs; a gradient that is not needed is None.

On a CPU ignored rows are dropped: `rows` are the others, None if none is ignored. On a GPU, where the host would have
to wait for their number, `rows` is always None and ignored rows are masked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Checks, is_number, values_are_read

checks = Checks("linear_logprob", "hidden")
require = checks.require


class LogprobOutput(NamedTuple):
    """Output of `linear_logprob`, each of target's shape; fp32, or fp64 if `hidden` is fp64. 0 at ignored targets.

    logprob  log-probability of the target, nats
    entropy  of the whole distribution, nats
    lse      log-sum-exp of the capped, tempered logits
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor


Outputs = tuple[Tensor, Tensor, Tensor]


class OutputGrads(NamedTuple):
    """Gradients of the loss with respect to LogprobOutput's three tensors; None stands for zero."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None


class Needs(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    bias: bool = False


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]  # of the inputs, in the order of `Needs`

# What the forward keeps for the backward: n >= 0 is a budget in bytes for numerators of the softmax; this is the
# derivative of logprob by hidden.
DERIVATIVE = -1


class Results(NamedTuple):
    """What a forward returns: the three outputs, and what it keeps for the backward.

    kept   DERIVATIVE: d logprob / d hidden [T, D] in hidden's dtype. A budget: exp(x - peak) [K, V] of the first K rows
           in the operands' dtype. Nothing kept: [0]. Rows are counted without those that are dropped.
    peaks  a budget: [tiles + 1, K], the peak of each tile and row, and last the logprobs; else [0]
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    kept: Tensor
    peaks: Tensor


class Saved(NamedTuple):
    """What a backward reads of the forward's results; `keep` is the forward's argument."""

    entropy: Tensor
    lse: Tensor
    kept: Tensor | None = None
    peaks: Tensor | None = None
    keep: int = 0


class Inputs(NamedTuple):
    """Arguments of `prudent::linear_logprob`, in schema order."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    temperature: float
    softcap: float | None
    ignore_index: int | None
    bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, weight and target."""
        return self[:3]

    @property
    def options(self) -> tuple[float, float | None, int | None]:
        """temperature, softcap and ignore_index."""
        return self[3:6]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of the outputs, the statistics and every sum."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def operand(self) -> torch.dtype:
        """The dtype of the products' operands: hidden's and weight's if they are the same, else the accumulator's."""
        return self.hidden.dtype if self.hidden.dtype == self.weight.dtype else self.accumulator


def check_inputs(inputs: Inputs) -> None:
    """Raise ValueError for a wrong shape, dtype, device or option. Reads no values, so it serves fake tensors too."""
    hidden, weight, target = inputs.tensors
    for name in ("hidden", "weight"):
        value = getattr(inputs, name)
        checks.tensor(value, name)
        checks.floating(value, name)
    checks.tensor(target, "target")
    require(hidden.dim() >= 1 and hidden.shape[-1] > 0, "hidden", "shape [..., D] with D >= 1", list(hidden.shape))
    dim = hidden.shape[-1]
    fits = weight.dim() == 2 and weight.shape[1] == dim and weight.shape[0] > 0
    require(fits, "weight", f"shape [V, {dim}] with V >= 1", list(weight.shape))
    checks.last_dimension(hidden, "hidden")
    checks.last_dimension(weight, "weight")
    checks.width(weight, "weight", hidden)
    require(target.dtype == torch.int64, "target", "dtype int64", target.dtype)
    require(
        target.shape == hidden.shape[:-1],
        "target",
        f"shape {list(hidden.shape[:-1])} (hidden's leading dimensions)",
        list(target.shape),
    )
    checks.device(weight, "weight", hidden)
    checks.device(target, "target", hidden)
    checks.vector(inputs.bias, "bias", weight.shape[0], hidden, storage=True)
    checks.device(inputs.bias, "bias", hidden)
    _check_options(inputs)


def _check_options(inputs: Inputs) -> None:
    for name in ("temperature", "softcap"):
        value = getattr(inputs, name)
        if name == "softcap" and value is None:
            continue
        allowed = "a finite number above 0" + (" or None" if name == "softcap" else "")
        require(is_number(value) and math.isfinite(value) and value > 0, name, allowed, value)
        # the kernels multiply by the inverse
        greatest = torch.finfo(inputs.accumulator).max
        usable = value <= greatest and 1 / value <= greatest
        of = "fp64" if inputs.accumulator == torch.float64 else "fp32"
        require(usable, name, f"a number that, like its inverse, is finite in {of}", value)
    index = inputs.ignore_index
    whole = index is None or (isinstance(index, int) and not isinstance(index, bool))
    require(whole, "ignore_index", "an integer or None", index)


def check_values(inputs: Inputs, shards: int = 1) -> None:
    """Raise ValueError for a target that is no token of a vocabulary of `shards` times V, if `values_are_read`."""
    target = inputs.target
    if not values_are_read(target):
        return
    vocabulary = inputs.weight.shape[0] * shards
    wrong = (target < 0) | (target >= vocabulary)
    if inputs.ignore_index is not None:
        wrong &= target != inputs.ignore_index
    if bool(wrong.any()):
        besides = "" if inputs.ignore_index is None else f" or {inputs.ignore_index} (ignore_index)"
        checks.refuse("target", f"values in [0, {vocabulary}){besides}", int(target[wrong][0]))


def check_keep_bytes(value: object) -> None:
    """Raise ValueError unless `value` is None or a whole number of bytes."""
    whole = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    require(whole, "keep_bytes", "a whole number of bytes or None", value)
