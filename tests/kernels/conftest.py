"""Fixtures for tests of the native library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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
