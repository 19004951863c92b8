"""Argument checks that the ops share. Every error reads `<op>: <argument>: expected <expected>, got <got>`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor

STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a Python int or float, False for a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Checks:
    """The checks of one op; each raises ValueError.

    `leader` is the argument whose device the others must share; they may be float64 only if it is. Checks that run in
    every eager call build their message only when they fail.
    """

    op: str
    leader: str

    def refuse(self, argument: str, expected: str, got: object) -> NoReturn:
        """Raise the error."""
        raise ValueError(f"{self.op}: {argument}: expected {expected}, got {got}")

    def require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        """Raise the error unless `ok`."""
        if not ok:
            self.refuse(argument, expected, got)

    def tensor(self, value: object, argument: str, optional: bool = False) -> None:
        """Require a dense tensor, or None if `optional`."""
        if optional and value is None:
            return
        if not isinstance(value, Tensor):
            self.refuse(argument, "a tensor or None" if optional else "a tensor", type(value).__name__)
        if value.layout != torch.strided:
            self.refuse(argument, "a dense tensor", value.layout)

    def floating(self, value: Tensor, argument: str) -> None:
        """Require one of the STORAGE dtypes."""
        if value.dtype not in STORAGE:
            self.refuse(argument, "dtype bfloat16, float16, float32 or float64", value.dtype)

    def width(self, value: Tensor, argument: str, leader: Tensor) -> None:
        """Allow float64 only with a float64 leader."""
        if value.dtype == torch.float64 and leader.dtype != torch.float64:
            self.refuse(argument, f"float64 only with float64 {self.leader}", value.dtype)

    def vector(self, value: Tensor | None, argument: str, length: int, leader: Tensor, storage: bool = False) -> None:
        """Require None or [length] in float32, any STORAGE dtype if `storage`, float64 with a float64 leader."""
        if value is None:
            return
        self.tensor(value, argument, optional=True)
        if value.dim() != 1 or value.shape[0] != length:
            self.refuse(argument, f"shape [{length}]", list(value.shape))
        if value.dtype not in (STORAGE if storage else STORAGE[2:]):
            self.refuse(argument, "a floating dtype" if storage else "dtype float32", value.dtype)
        self.width(value, argument, leader)

    def last_dimension(self, value: Tensor, argument: str) -> None:
        """Require a contiguous last dimension, for vector loads."""
        if value.stride(-1) != 1 and value.shape[-1] != 1:
            self.refuse(argument, "a contiguous last dimension (stride 1)", f"stride {value.stride(-1)}")

    def device(self, value: object, argument: str, leader: Tensor) -> None:
        """Require the leader's device. A value that is not a tensor passes."""
        if isinstance(value, Tensor) and value.device != leader.device:
            possessive = self.leader + ("'" if self.leader.endswith("s") else "'s")
            self.refuse(argument, f"device {leader.device} ({possessive})", value.device)

    def not_negative(self, value: object, argument: str) -> None:
        """Require a finite number >= 0."""
        # dynamo can trace this comparison of a symbolic float, but not math.isfinite
        if not (is_number(value) and 0 <= value <= sys.float_info.max):
            self.refuse(argument, "a finite number >= 0", value)

    def indices(self, value: Tensor | None, argument: str, bound: int, of: str) -> None:
        """Require values in [0, bound), or None. Reads the tensor, so check `values_are_read` first."""
        if value is not None and value.numel():
            low, high = (int(v) for v in torch.aminmax(value))
            if low < 0 or high >= bound:
                self.refuse(argument, f"values in [0, {bound}) ({of})", low if low < 0 else high)


def values_are_read(leader: Tensor) -> bool:
    """True if checks may read values: always on a CPU, elsewhere with PRUDENT_DEBUG=1, because the host must wait."""
    return leader.device.type == "cpu" or os.environ.get("PRUDENT_DEBUG") == "1"
