"""Inputs, outputs and argument checks of `ensemble_reward`.

The fields of `Inputs` are the registered op's schema, in order. Each backend offers
    forward(inputs, keep) -> (reward [N], mean [N, K], std [N, K], reward_sum [], saved)
    backward(grads, inputs, saved, needs) -> (grad_hidden, grad_weight, grad_bias, grad_norm_weight)
with grads = OutputGrads and needs = Needs; a gradient that is not needed is None.

The forward keeps `saved` [N, 2K + 1] for the backward: the products after the norm and before the bias, and rstd in the
last column (1 without a norm). It takes 4 (2K + 1) bytes a row, beside 2 D for the features, and saves the backward a
pass over them. Without `keep` it is empty, [0, 2K + 1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Checks, values_are_read
from .spec import Aggregation

checks = Checks("ensemble_reward", "hidden")
refuse = checks.refuse


class EnsembleOutput(NamedTuple):
    """Output of `ensemble_reward` for N rows and K heads; fp32, or fp64 if `hidden` is fp64.

    reward      [N]     aggregated, centred if asked
    mean        [N, K]  the heads' means, calibrated
    std         [N, K]  the heads' standard deviations, > 0, calibrated
    reward_sum  []      sum of the aggregated rewards before centring; batch-sum regularisation squares it
    """

    reward: Tensor
    mean: Tensor
    std: Tensor
    reward_sum: Tensor


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of a backend's forward: EnsembleOutput's four, and `saved`


class OutputGrads(NamedTuple):
    """Gradients of the loss with respect to EnsembleOutput's four tensors; None stands for zero."""

    reward: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    reward_sum: Tensor | None


class Needs(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    norm_weight: bool


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of the inputs, in the order of `Needs`


class Inputs(NamedTuple):
    """Arguments of `prudent::ensemble_reward`, in schema order. `group_size` is 0 if no size is given."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    norm_weight: Tensor | None
    seed: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    std_ref: Tensor | None
    group: Tensor | None
    group_size: int
    norm_eps: float
    std_floor: float
    aggregation: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields `hidden` to `group`."""
        return self[:10]

    @property
    def options(self) -> tuple[int, float, float, str]:
        """The fields after the tensors."""
        return self[10:]

    @property
    def spec(self) -> Aggregation:
        return Aggregation.parse(self.aggregation)

    @property
    def num_rows(self) -> int:
        """N: the rows scored, not the rows stored."""
        return self.hidden.shape[0] if self.rows is None else self.rows.shape[0]

    @property
    def num_heads(self) -> int:
        return self.weight.shape[0] // 2

    @property
    def output_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


def check_inputs(inputs: Inputs) -> None:
    """Raise ValueError for a wrong shape, dtype, device or option. Reads no values, so it serves fake tensors too."""
    hidden, weight = inputs.hidden, inputs.weight
    for name, value in (("hidden", hidden), ("weight", weight)):
        checks.tensor(value, name)
        checks.floating(value, name)
        if value.dim() != 2:
            refuse(name, "2 dimensions after flattening", tuple(value.shape))
    dim = hidden.shape[1]
    if dim <= 0:
        refuse("hidden", "a last dimension above 0", list(hidden.shape))
    checks.last_dimension(hidden, "hidden")
    columns, width = weight.shape
    if width != dim or columns < 2 or columns % 2 != 0:
        refuse("weight", f"[2K, {dim}] with K >= 1 (rows 0..K-1 mean, K..2K-1 raw std)", list(weight.shape))
    checks.width(weight, "weight", hidden)
    heads = columns // 2
    checks.vector(inputs.bias, "bias", columns, hidden)
    checks.vector(inputs.norm_weight, "norm_weight", dim, hidden, storage=True)
    checks.vector(inputs.shift, "shift", heads, hidden)
    checks.vector(inputs.scale, "scale", heads, hidden)
    checks.vector(inputs.std_ref, "std_ref", heads, hidden)
    _check_seed_and_indices(inputs)
    _check_group(inputs)
    _check_options(inputs, heads)


def _check_seed_and_indices(inputs: Inputs) -> None:
    for name, value in (("seed", inputs.seed), ("rows", inputs.rows), ("group", inputs.group)):
        if value is None:
            continue
        checks.tensor(value, name, optional=True)
        if value.dtype != torch.int64:
            refuse(name, "dtype int64", value.dtype)
        if value.dim() != 1:
            refuse(name, "1 dimension", list(value.shape))
    if inputs.seed is not None and inputs.seed.shape[0] != 1:
        refuse("seed", "shape [1]", list(inputs.seed.shape))
    if inputs.group is not None and inputs.group.shape[0] != inputs.num_rows:
        refuse("group", f"shape [{inputs.num_rows}]", list(inputs.group.shape))
    for name, tensor in zip(Inputs._fields, inputs.tensors, strict=False):
        checks.device(tensor, name, inputs.hidden)


def _check_group(inputs: Inputs) -> None:
    centre, size = inputs.spec.centre, inputs.group_size
    if size < 0:
        refuse("group", "a group size above 0 or an int64 tensor of labels", size)
    given = inputs.group is not None or size > 0
    if centre == "group" and not given:
        refuse("group", "labels [N] or a group size with centre='group'", None)
    if given and centre != "group":
        refuse("group", "centre='group', its only use", f"centre={centre!r}")
    if size > 0 and inputs.num_rows % size != 0:
        refuse("group", f"a size that divides the {inputs.num_rows} rows", size)


def _check_options(inputs: Inputs, heads: int) -> None:
    checks.not_negative(inputs.norm_eps, "norm_eps")
    checks.not_negative(inputs.std_floor, "std_floor")
    inputs.spec.check_heads(heads)
    if inputs.spec.nominal == "relative_std" and inputs.std_ref is None:
        refuse("std_ref", "each head's typical std [K] with nominal=relative_std", None)


def check_values(inputs: Inputs) -> None:
    """Raise ValueError for indices, labels and scales out of range, if `values_are_read`."""
    if not values_are_read(inputs.hidden):
        return

    checks.indices(inputs.rows, "rows", inputs.hidden.shape[0], "rows of hidden")
    checks.indices(inputs.group, "group", inputs.num_rows, "labels below N")
    for name in ("scale", "std_ref"):
        value = getattr(inputs, name)
        if value is not None and not bool((value > 0).all()):
            refuse(name, "values above 0", value.tolist())
