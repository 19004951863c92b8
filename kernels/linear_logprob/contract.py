"""Inputs, outputs and argument checks of `linear_logprob`.

The fields of `Inputs` are the registered op's schema, in order. `rows` [R] int64 are the positions of the flattened
target that are not ignored, or None if none is. Each backend offers
    forward(inputs, rows) -> (logprob, entropy, lse), each of target's shape
    backward(grads, inputs, rows, entropy, lse, needs) -> (grad_hidden, grad_weight)
with grads = OutputGrads and needs = Needs; a gradient that is not needed is None.
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


Grads = tuple[Tensor | None, Tensor | None]  # of the inputs, in the order of `Needs`


class Inputs(NamedTuple):
    """Arguments of `prudent::linear_logprob`, in schema order."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    temperature: float
    softcap: float | None
    ignore_index: int | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, weight and target."""
        return self[:3]

    @property
    def options(self) -> tuple[float, float | None, int | None]:
        """The fields after the tensors."""
        return self[3:]

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


def check_values(inputs: Inputs) -> None:
    """Raise ValueError for a target that is not a token, if `values_are_read`."""
    target = inputs.target
    if not values_are_read(target):
        return
    vocabulary = inputs.weight.shape[0]
    wrong = (target < 0) | (target >= vocabulary)
    if inputs.ignore_index is not None:
        wrong &= target != inputs.ignore_index
    if bool(wrong.any()):
        besides = "" if inputs.ignore_index is None else f" or {inputs.ignore_index} (ignore_index)"
        checks.refuse("target", f"values in [0, {vocabulary}){besides}", int(target[wrong][0]))


def kept_rows(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Positions of the flattened target that are not ignored; None: all. On a GPU the host waits for their number."""
    if ignore_index is None:
        return None
    rows = torch.nonzero(target.reshape(-1) != ignore_index).squeeze(1)
    return None if rows.shape[0] == target.numel() else rows
