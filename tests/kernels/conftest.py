"""Fixtures for tests of the kernels: the native library's instruction sets and memory, and the interpreter's e^x."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from prudent.bench.interpreter import accept_new_numpy
from prudent.kernels import native


@pytest.fixture(params=native.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, in turn."""
    with native.force_isa(request.param):
        yield request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch fills what C++ allocates, outputs and workspace both, with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Triton's interpreter, e^x of fp32 is 2^(x log2 e) with the roundings of a GPU, which has only 2^x."""
    if "triton" not in sys.modules or not sys.modules["triton"].knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    accept_new_numpy()

    def exponential(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.exp2(x * np.float32(np.log2(np.e))) if x.dtype == np.float32 else np.exp(x)

    monkeypatch.setattr(InterpreterBuilder, "create_exp", lambda self, arg: self.unary_op(arg, exponential))
