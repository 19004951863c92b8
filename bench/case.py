"""What a benchmark case is, and the check that must pass before its time counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = ("smoke", "small", "full")
_ROUNDING = 16 * torch.finfo(torch.float32).eps  # of a result near the largest: what another order of adding moves


class Check(NamedTuple):
    """Ours against fp64. The errors are of the worst output: largest difference over the largest reference value."""

    passed: bool
    output: str
    error: float
    eager_error: float
    bound: float


@dataclass
class Work:
    """A case with its tensors on a device.

    inputs: input sets, used in turn. variants: what is timed, each called with one input set; "ours" and "eager" are
    always there, the order is the table's. check: ours against the reference in fp64, on the first input set.
    grad: the variants differentiate; without it they run under `torch.no_grad()`. notes: which variant is missing, why.
    """

    inputs: list[tuple[Any, ...]]
    variants: dict[str, Callable[..., Any]]
    check: Callable[[], Check]
    grad: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One op, mode, shape and dtype. Nothing is allocated before `make`.

    bytes_moved is the floor: every input of a pass read once, every output written once; forward and backward are two
    passes. flops: of the matrix products, or of the formula where there are none.
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
    """Input sets of a case: two on a GPU, so that no call finds what the one before it left in the cache."""
    return 2 if device.type == "cuda" else 1


def compiled_variants(function: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """torch.compile of `function`; on a GPU with max-autotune too.

    Without its CUDA graphs: they would copy the inputs into buffers of their own, more than these ops read.
    """
    found = {"compiled": torch.compile(function, fullgraph=True, dynamic=False)}
    if device.type == "cuda":
        found["autotuned"] = torch.compile(function, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    return found


def compare(ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Check:
    """`judge` of each output's relative error against the fp64 one."""
    return judge(
        {name: (relative_error(ours[name], want), relative_error(eager[name], want)) for name, want in exact.items()}
    )


def judge(errors: Mapping[str, tuple[float, float]]) -> Check:
    """output -> (error, eager's): ours may be at most twice as far off as plain torch in the case's dtype is."""
    found = []
    for output, (error, eager) in errors.items():
        bound = 2 * eager + _ROUNDING
        found.append(Check(error <= bound, output, error, eager, bound))
    return max(found, key=lambda check: (not check.passed, check.error / check.bound))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |value - reference| / max |reference|; infinite where a shape differs or a value is not finite."""
    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    largest = max(float(reference.abs().max()), torch.finfo(torch.float64).tiny)
    return float((value.to(reference.dtype) - reference).abs().max()) / largest
