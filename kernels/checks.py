"""What the ops' contracts refuse alike, in one form: `<op>: <argument>: expected <expected>, got <got>`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor

STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_number(value: object) -> TypeGuard[int | float]:
    """A Python int or float; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Checks:
    """One op's refusals. `leader` is the argument whose device, and whose float64, the others follow.

    Each raises ValueError. Where a check runs in every eager call, its message is built only for a refusal.
    """

    op: str
    leader: str

    def refuse(self, argument: str, expected: str, got: object) -> NoReturn:
        """The ops' one form of error."""
        raise ValueError(f"{self.op}: {argument}: expected {expected}, got {got}")

    def require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        """Refuse unless `ok`."""
        if not ok:
            self.refuse(argument, expected, got)

    def tensor(self, value: object, argument: str, optional: bool = False) -> None:
        """A dense tensor; None too if `optional`."""
        if optional and value is None:
            return
        if not isinstance(value, Tensor):
            self.refuse(argument, "a tensor or None" if optional else "a tensor", type(value).__name__)
        if value.layout != torch.strided:
            self.refuse(argument, "a dense tensor", value.layout)

    def floating(self, value: Tensor, argument: str) -> None:
        """Of a storage dtype."""
        if value.dtype not in STORAGE:
            self.refuse(argument, "dtype bfloat16, float16, float32 or float64", value.dtype)

    def width(self, value: Tensor, argument: str, leader: Tensor) -> None:
        """float64 only beside a float64 leader."""
        if value.dtype == torch.float64 and leader.dtype != torch.float64:
            self.refuse(argument, f"float64 only beside float64 {self.leader}", value.dtype)

    def vector(self, value: Tensor | None, argument: str, length: int, leader: Tensor, storage: bool = False) -> None:
        """None, or [length]: float32, any storage dtype with `storage`, float64 beside a float64 leader."""
        if value is None:
            return
        self.tensor(value, argument, optional=True)
        if value.dim() != 1 or value.shape[0] != length:
            self.refuse(argument, f"shape [{length}]", list(value.shape))
        if value.dtype not in (STORAGE if storage else STORAGE[2:]):
            self.refuse(argument, "a floating dtype" if storage else "dtype float32", value.dtype)
        self.width(value, argument, leader)

    def last_dimension(self, value: Tensor, argument: str) -> None:
        """Contiguous, as vector loads need it."""
        if value.stride(-1) != 1 and value.shape[-1] != 1:
            self.refuse(argument, "a contiguous last dimension (stride 1)", f"stride {value.stride(-1)}")

    def device(self, value: object, argument: str, leader: Tensor) -> None:
        """On the leader's device; what is no tensor passes."""
        if isinstance(value, Tensor) and value.device != leader.device:
            possessive = self.leader + ("'" if self.leader.endswith("s") else "'s")
            self.refuse(argument, f"device {leader.device} ({possessive})", value.device)

    def not_negative(self, value: object, argument: str) -> None:
        """A finite number >= 0."""
        # a comparison: dynamo traces it on a symbolic float, math.isfinite not
        if not (is_number(value) and 0 <= value <= sys.float_info.max):
            self.refuse(argument, "a finite number >= 0", value)

    def indices(self, value: Tensor | None, argument: str, bound: int, of: str) -> None:
        """Values in [0, bound), or None. Reads them: see `values_are_read`."""
        if value is not None and value.numel():
            low, high = (int(v) for v in torch.aminmax(value))
            if low < 0 or high >= bound:
                self.refuse(argument, f"values in [0, {bound}) ({of})", low if low < 0 else high)


def values_are_read(leader: Tensor) -> bool:
    """Whether values are looked at: on a CPU; elsewhere with PRUDENT_DEBUG=1, for it makes the host wait."""
    return leader.device.type == "cpu" or os.environ.get("PRUDENT_DEBUG") == "1"
