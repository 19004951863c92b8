"""Inputs, outputs and argument checks of `ensemble_reward`.

The fields of `Inputs` are the registered op's schema, in order. Each backend offers
    forward(inputs, keep) -> (reward [N], mean [N, K], std [N, K], reward_sum [], distance [N] or None, saved)
    backward(grads, inputs, saved, needs) -> (grad_hidden, grad_weight, grad_bias, grad_norm_weight)
with grads = OutputGrads and needs = Needs; a gradient that is not needed is None.

The forward keeps `saved` [N, S] for the backward, which it saves a pass over the features. Its columns, f the features
after the norm:
    2K      the products with the heads' weight, after the norm and before the bias
    1       rstd (1 without a norm)
    R       with a trust region: directions_r . (f - mean)
    2       with a trust region: D2, before it is clamped at 0; and mean' P (f - mean), P the precision matrix, for the
            norm's gradient (undefined without a norm)
    1       with `batch_worst` or `worst=batch`: the index k* of the batch's worst head, in every row
S is 2K + 1 in the plain case: 4 (2K + 1) bytes a row beside 2 D for the features. Without `keep`, `saved` is [0, S].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Checks, values_are_read
from .spec import Aggregation
from .trust import TrustRegion

checks = Checks("ensemble_reward", "hidden")
refuse = checks.refuse


class EnsembleOutput(NamedTuple):
    """Output of `ensemble_reward` for N rows and K heads; fp32, or fp64 if `hidden` is fp64.

    reward      [N]     aggregated, centred if asked
    mean        [N, K]  the heads' means, calibrated
    std         [N, K]  the heads' standard deviations, > 0, calibrated
    reward_sum  []      sum of the aggregated rewards before centring; batch-sum regularisation squares it
    distance    [N]     from the trust region's mean, 1 = the 95 % quantile of the reference responses; None without one
    """

    reward: Tensor
    mean: Tensor
    std: Tensor
    reward_sum: Tensor
    distance: Tensor | None = None


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]  # EnsembleOutput's five, and `saved`


class OutputGrads(NamedTuple):
    """Gradients of the loss with respect to EnsembleOutput's five tensors; None stands for zero."""

    reward: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    reward_sum: Tensor | None
    distance: Tensor | None = None


class Needs(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    norm_weight: bool


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of the inputs, in the order of `Needs`


class Inputs(NamedTuple):
    """Arguments of `prudent::ensemble_reward`, in schema order. `group_size` is 0 if no size is given; the fields of
    the trust region are all tensors or all None.
    """

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
    trust_mean: Tensor | None = None
    trust_precision: Tensor | None = None
    trust_directions: Tensor | None = None
    trust_weights: Tensor | None = None
    trust_unit: Tensor | None = None
    trust_rms: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields `hidden` to `group` and those of the trust region."""
        return self[:10] + self[14:]

    @property
    def options(self) -> tuple[int, float, float, str]:
        """The fields between the tensors."""
        return self[10:14]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], options: tuple[int, float, float, str]) -> Inputs:
        """The inverse of `tensors` and `options`."""
        return cls(*tensors[:10], *options, *tensors[10:])  # type: ignore[call-arg, arg-type]

    @property
    def trust(self) -> TrustRegion | None:
        return None if self.trust_mean is None else TrustRegion(*self[14:])  # type: ignore[arg-type]

    @property
    def saved_columns(self) -> int:
        """S, the width of the forward's saved tensor."""
        region = 0 if self.trust_directions is None else self.trust_directions.shape[0] + 2
        return self.weight.shape[0] + 1 + region + self.spec.of_batch

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
    _check_trust(inputs, dim)
    _check_seed_and_indices(inputs)
    _check_group(inputs)
    _check_options(inputs, heads)


def _check_trust(inputs: Inputs, dim: int) -> None:
    given = inputs[14:]
    if all(value is None for value in given):
        if inputs.spec.trust is not None:
            refuse("trust", f"a TrustRegion with the price in aggregation {inputs.aggregation!r}", None)
        return
    directions = inputs.trust_directions
    for name, value in zip(Inputs._fields[14:], given, strict=True):
        checks.tensor(value, _dotted(name))
    assert directions is not None
    if directions.dim() != 2 or directions.shape[1] != dim:
        refuse("trust.directions", f"shape [R, {dim}]", list(directions.shape))
    if directions.dtype not in (torch.float32, torch.float64):
        refuse("trust.directions", "dtype float32", directions.dtype)
    checks.width(directions, "trust.directions", inputs.hidden)
    lengths = {"mean": dim, "precision": dim, "weights": directions.shape[0], "unit": 1, "rms": 1}
    for name, length in lengths.items():
        checks.vector(getattr(inputs, f"trust_{name}"), f"trust.{name}", length, inputs.hidden)


def _dotted(field: str) -> str:
    """A field of the trust region as its user knows it."""
    return field.replace("trust_", "trust.")


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
    for name, argument in zip(Inputs._fields, inputs, strict=True):
        checks.device(argument, _dotted(name), inputs.hidden)


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
    region = inputs.trust
    if region is None:
        return
    for name in ("unit", "rms"):
        number = float(getattr(region, name))
        if not 0 < number < math.inf:
            refuse(f"trust.{name}", "a finite number above 0", number)
    fine = (region.precision >= 0) & (region.precision < math.inf)
    if not bool(fine.all()):
        refuse("trust.precision", "finite numbers >= 0", region.precision[~fine].tolist()[:3])
