"""What crosses between `preference_step` and its executions, and every refusal, in one place.

`Inputs` is the schema of the registered op in order; each backend offers
    step(inputs) -> (loss [], dweight [2K, D], dbias [2K], accuracy [], std [])
with loss, accuracy and std in `output_dtype` and the gradients in the dtypes of weight and bias. std is 0 for "bt".
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

LOSSES = ("bt", "brme")
_STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class StepOutput(NamedTuple):
    """What `preference_step` returns. fp32, or fp64 when `features` is fp64; no part carries a gradient.

    loss      []       mean over pairs, with the penalties
    dweight   [2K, D]  d loss / d weight, in weight's dtype
    dbias     [2K]     d loss / d bias, in bias's dtype
    accuracy  []       share of pairs whose chosen response is rewarded above the rejected one (a tie is wrong): by the
                       mean of heads for "bt", by the mean of the pair's own head for "brme"
    std       []       mean over the 2P rows of the own head's std; None for "bt", which computes no std
    """

    loss: Tensor
    dweight: Tensor
    dbias: Tensor
    accuracy: Tensor
    std: Tensor | None


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of a backend


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


TENSORS = Inputs._fields[:8]


def require(ok: bool, argument: str, expected: str, got: object) -> None:
    """Raise the op's one form of error: `preference_step: <argument>: expected <expected>, got <got>`."""
    if not ok:
        raise ValueError(f"preference_step: {argument}: expected {expected}, got {got}")


def check_inputs(inputs: Inputs) -> None:
    """Refuse every shape, dtype, device and option outside the contract. Reads no values, so it serves fakes too."""
    for name in TENSORS:
        value = getattr(inputs, name)
        optional = name not in ("features", "weight", "bias")
        if not (optional and value is None):
            expected = "a tensor or None" if optional else "a tensor"
            require(isinstance(value, Tensor), name, expected, type(value).__name__)
    _check_matrices(inputs)
    _check_rows(inputs)
    _check_loss(inputs)
    pairs = inputs.num_pairs
    _check_vector(inputs, "bias", 2 * inputs.num_heads)
    _check_vector(inputs, "p_hat", pairs)
    _check_vector(inputs, "margin", pairs)
    for name, length in (("head_id", pairs), ("seed", 1)):
        value = getattr(inputs, name)
        if value is not None:
            require(value.dtype == torch.int64, name, "dtype int64", value.dtype)
            require(tuple(value.shape) == (length,), name, f"shape [{length}]", list(value.shape))
    for name in TENSORS[1:]:
        value = getattr(inputs, name)
        if value is not None:
            device = inputs.features.device
            require(value.device == device, name, f"device {device} (features')", value.device)


def _check_matrices(inputs: Inputs) -> None:
    features, weight = inputs.features, inputs.weight
    for name, value in (("features", features), ("weight", weight)):
        require(value.dtype in _STORAGE, name, "dtype bfloat16, float16, float32 or float64", value.dtype)
        require(value.dim() == 2, name, "2 dimensions", list(value.shape))
    dim = features.shape[1]
    require(dim > 0, "features", "a last dimension above 0", list(features.shape))
    require(
        features.stride(1) == 1 or dim == 1,
        "features",
        "a contiguous last dimension (stride 1)",
        f"stride {features.stride(1)}",
    )
    require(
        weight.shape[1] == dim and weight.shape[0] >= 2 and weight.shape[0] % 2 == 0,
        "weight",
        f"[2K, {dim}] with K >= 1 (rows 0..K-1 mean, K..2K-1 raw std)",
        list(weight.shape),
    )
    wide = features.dtype == torch.float64
    require(weight.dtype != torch.float64 or wide, "weight", "float64 only beside float64 features", weight.dtype)


def _check_rows(inputs: Inputs) -> None:
    rows = inputs.rows
    if rows is not None:
        require(rows.dtype == torch.int64, "rows", "dtype int64", rows.dtype)
        require(rows.dim() == 1, "rows", "1 dimension", list(rows.shape))
    name = "features" if rows is None else "rows"
    expected = "an even number of rows above 0 (chosen first, then rejected)"
    require(inputs.num_rows > 0 and inputs.num_rows % 2 == 0, name, expected, inputs.num_rows)


def _check_vector(inputs: Inputs, name: str, length: int) -> None:
    value = getattr(inputs, name)
    if value is None:
        return
    require(tuple(value.shape) == (length,), name, f"shape [{length}]", list(value.shape))
    require(value.dtype in (torch.float32, torch.float64), name, "dtype float32", value.dtype)
    wide = inputs.features.dtype == torch.float64
    require(value.dtype != torch.float64 or wide, name, "float64 only beside float64 features", value.dtype)


def _check_loss(inputs: Inputs) -> None:
    require(inputs.loss in LOSSES, "loss", f"one of {', '.join(LOSSES)}", repr(inputs.loss))
    brme = inputs.loss == "brme"
    for name in ("head_id", "p_hat"):
        expected = f"a tensor [{inputs.num_pairs}] with loss 'brme' and none with 'bt'"
        given = getattr(inputs, name) is not None
        require(given == brme, name, expected, f"{'one' if given else 'none'} with {inputs.loss!r}")
    require(inputs.seed is None or brme, "seed", "none with loss 'bt', which draws no noise", "one")
    require(inputs.margin is None or not brme, "margin", "none with loss 'brme', which has no margin", "one")
    for name in ("alpha", "bsr", "centre", "std_floor"):
        value = getattr(inputs, name)
        require(math.isfinite(value) and value >= 0, name, "a finite number >= 0", value)


def check_values(inputs: Inputs) -> None:
    """Refuse indices and probabilities out of range: on CPU; elsewhere with PRUDENT_DEBUG=1 (it stalls the stream)."""
    if inputs.features.device.type != "cpu" and os.environ.get("PRUDENT_DEBUG") != "1":
        return
    bounds = (("rows", inputs.features.shape[0], "rows of features"), ("head_id", inputs.num_heads, "heads"))
    for name, bound, of in bounds:
        value = getattr(inputs, name)
        if value is not None:
            low, high = (int(v) for v in torch.aminmax(value))
            require(low >= 0 and high < bound, name, f"values in [0, {bound}) ({of})", low if low < 0 else high)
    if inputs.p_hat is not None:
        least, most = (float(v) for v in torch.aminmax(inputs.p_hat))
        require(least > 0 and most < 1, "p_hat", "values in (0, 1)", most if least > 0 else least)
