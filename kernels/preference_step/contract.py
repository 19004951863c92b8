"""Inputs, outputs and argument checks of `preference_step`.

The fields of `Inputs` are the registered op's schema, in order. Each backend offers
    step(inputs) -> (loss [], dweight [2K, D], dbias [2K], accuracy [], std [])
with loss, accuracy and std in `output_dtype` and the gradients in the dtypes of weight and bias. std is 0 for "bt".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Checks, values_are_read

LOSSES = ("bt", "brme")
NUMBERS = ("alpha", "bsr", "centre", "std_floor")

checks = Checks("preference_step", "features")
require = checks.require


class StepOutput(NamedTuple):
    """Output of `preference_step`, without autograd history; fp32, or fp64 if `features` is fp64.

    loss      []       mean over pairs, with the penalties
    dweight   [2K, D]  d loss / d weight, in weight's dtype
    dbias     [2K]     d loss / d bias, in bias's dtype
    accuracy  []       share of pairs whose chosen response has the higher reward (a tie is wrong): the mean of heads
                       for "bt", the mean of the pair's own head for "brme"
    std       []       mean over the 2P rows of the std of the pair's own head; None for "bt", which computes no std
    """

    loss: Tensor
    dweight: Tensor
    dbias: Tensor
    accuracy: Tensor
    std: Tensor | None


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of a backend's step


class Inputs(NamedTuple):
    """Arguments of `prudent::preference_step`, in schema order."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    rows: Tensor | None
    head_id: Tensor | None
    p_hat: Tensor | None
    margin: Tensor | None
    seed: Tensor | None
    loss: str
    alpha: float
    bsr: float
    centre: float
    std_floor: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields `features` to `seed`."""
        return self[:8]

    @property
    def num_rows(self) -> int:
        """2P: the rows of the batch, not the rows stored."""
        return self.features.shape[0] if self.rows is None else self.rows.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.num_rows // 2

    @property
    def num_heads(self) -> int:
        return self.weight.shape[0] // 2

    @property
    def output_dtype(self) -> torch.dtype:
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32


def check_inputs(inputs: Inputs) -> None:
    """Raise ValueError for a wrong shape, dtype, device or option. Reads no values, so it serves fake tensors too."""
    for name, tensor in zip(Inputs._fields, inputs.tensors, strict=False):
        checks.tensor(tensor, name, optional=name not in ("features", "weight", "bias"))
    _check_matrices(inputs)
    _check_rows(inputs)
    _check_loss(inputs)
    pairs = inputs.num_pairs
    checks.vector(inputs.bias, "bias", 2 * inputs.num_heads, inputs.features)
    checks.vector(inputs.p_hat, "p_hat", pairs, inputs.features)
    checks.vector(inputs.margin, "margin", pairs, inputs.features)
    for name, length in (("head_id", pairs), ("seed", 1)):
        value = getattr(inputs, name)
        if value is not None:
            require(value.dtype == torch.int64, name, "dtype int64", value.dtype)
            require(tuple(value.shape) == (length,), name, f"shape [{length}]", list(value.shape))
    for name, tensor in zip(Inputs._fields, inputs.tensors, strict=False):
        checks.device(tensor, name, inputs.features)


def _check_matrices(inputs: Inputs) -> None:
    features, weight = inputs.features, inputs.weight
    for name, value in (("features", features), ("weight", weight)):
        checks.floating(value, name)
        require(value.dim() == 2, name, "2 dimensions", list(value.shape))
    dim = features.shape[1]
    require(dim > 0, "features", "a last dimension above 0", list(features.shape))
    checks.last_dimension(features, "features")
    require(
        weight.shape[1] == dim and weight.shape[0] >= 2 and weight.shape[0] % 2 == 0,
        "weight",
        f"[2K, {dim}] with K >= 1 (rows 0..K-1 mean, K..2K-1 raw std)",
        list(weight.shape),
    )
    checks.width(weight, "weight", features)


def _check_rows(inputs: Inputs) -> None:
    rows = inputs.rows
    if rows is not None:
        require(rows.dtype == torch.int64, "rows", "dtype int64", rows.dtype)
        require(rows.dim() == 1, "rows", "1 dimension", list(rows.shape))
    name = "features" if rows is None else "rows"
    expected = "an even number of rows above 0 (chosen first, then rejected)"
    require(inputs.num_rows > 0 and inputs.num_rows % 2 == 0, name, expected, inputs.num_rows)


def _check_loss(inputs: Inputs) -> None:
    require(inputs.loss in LOSSES, "loss", f"one of {', '.join(LOSSES)}", repr(inputs.loss))
    brme = inputs.loss == "brme"
    for name in ("head_id", "p_hat"):
        expected = f"a tensor [{inputs.num_pairs}] with loss 'brme' and none with 'bt'"
        given = getattr(inputs, name) is not None
        require(given == brme, name, expected, f"{'one' if given else 'none'} with {inputs.loss!r}")
    require(inputs.seed is None or brme, "seed", "none with loss 'bt', which draws no noise", "one")
    require(inputs.margin is None or not brme, "margin", "none with loss 'brme', which has no margin", "one")
    for name in NUMBERS:
        checks.not_negative(getattr(inputs, name), name)


def check_values(inputs: Inputs) -> None:
    """Raise ValueError for indices and probabilities out of range, if `values_are_read`."""
    if not values_are_read(inputs.features):
        return
    checks.indices(inputs.rows, "rows", inputs.features.shape[0], "rows of features")
    checks.indices(inputs.head_id, "head_id", inputs.num_heads, "heads")
    if inputs.p_hat is not None:
        least, most = (float(v) for v in torch.aminmax(inputs.p_hat))
        require(least > 0 and most < 1, "p_hat", "values in (0, 1)", most if least > 0 else least)
