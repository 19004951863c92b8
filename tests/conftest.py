"""Fixtures for every test: the shared material where it is present, and uninitialised memory that cannot look right."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a model hub is a broken test

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and a real small model beside the checkout; a user's machine has none of it."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the folder `shared` (real data and a small model) is not beside the checkout")
    return folder


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("prudent.") and result.device.type != "meta" and type(result) is torch.Tensor:
            result.fill_(float("nan") if result.dtype.is_floating_point else -(2**30))
        return result

    return wrapper


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like, empty_strided and Tensor.new_empty called from prudent come back full of NaN.

    After flash-linear-attention's conftest: an op that forgets to write part of an output fails, instead of passing on
    memory that happened to hold zeros.
    """
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
