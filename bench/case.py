"""Define a benchmark case, and the check that it must pass before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = ("smoke", "small", "full")
_ROUNDING = (
    16 * torch.finfo(torch.float32).eps
)  # relative to the largest value: the effect of another order of summation


class Check(NamedTuple):
    """Our error against fp64, and eager's: largest difference / largest reference value, for the worst output."""

    passed: bool
    output: str
    error: float
    eager_error: float
    bound: float


@dataclass
class Work:
    """A case with its tensors on a device.

    inputs: input sets, used in turn. variants: the timed functions, in the table's order, each called with one input
    set; "ours" and "eager" are always present. check: compares ours with the fp64 reference on the first input set.
    grad: whether the variants compute gradients; if not, they run under `torch.no_grad()`. notes: why a variant is
    missing.
    """

    inputs: list[tuple[Any, ...]]
    variants: dict[str, Callable[..., Any]]
    check: Callable[[], Check]
    grad: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One op, mode, shape and dtype. `make` allocates its tensors.

    bytes_moved: the least possible traffic, with every input of a pass read once and every output written once; forward
    and backward are two passes. flops: of the matrix products, or of the formula if it has none.
    """

    op: str
    mode: str
    shape: str
    dtype: str
    size: str
    bytes_moved: int
    flops: int
    make: Callable[[torch.device], Work]
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def name(self) -> str:
        return f"{self.op}, {self.mode}, {self.shape}, {self.dtype}"


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def num_sets(device: torch.device) -> int:
    """The number of input sets of a case: two on a GPU, so that a call does not find its inputs in the cache."""
    return 2 if device.type == "cuda" else 1


def compiled_variants(function: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """`function` under torch.compile; on a GPU also with max-autotune.

    CUDA graphs stay off, because they copy the inputs into buffers: more traffic than these ops have.
    """
    found = {"compiled": torch.compile(function, fullgraph=True, dynamic=False)}
    if device.type == "cuda":
        found["autotuned"] = torch.compile(function, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    return found


def compare(ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Check:
    """`judge` the relative error of each output against fp64."""
    return judge(
        {name: (relative_error(ours[name], want), relative_error(eager[name], want)) for name, want in exact.items()}
    )


def judge(errors: Mapping[str, tuple[float, float]]) -> Check:
    """Pass if each output's error is at most twice that of plain torch in the same dtype. errors: output -> (ours,
    eager's).
    """
    found = []
    for output, (error, eager) in errors.items():
        bound = 2 * eager + _ROUNDING
        found.append(Check(error <= bound, output, error, eager, bound))
    return max(found, key=lambda check: (not check.passed, check.error / check.bound))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |value - reference| / max |reference|; infinite if a shape differs or a value is not finite."""
    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    largest = max(float(reference.abs().max()), torch.finfo(torch.float64).tiny)
    return float((value.to(reference.dtype) - reference).abs().max()) / largest
