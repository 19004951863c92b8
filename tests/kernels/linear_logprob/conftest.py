"""Tiles small enough for small tests."""

from __future__ import annotations

import pytest

from prudent.kernels.linear_logprob import call
from prudent.kernels.linear_logprob.configs import Plan


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of [4, 16], so that a small call has several chunks each way, the last ones narrower, and the backward's
    products take two tiles at once.
    """
    monkeypatch.setattr(call, "plan", lambda *shapes: Plan(4, 16, 2))
    monkeypatch.setattr(call, "kept_columns", lambda *shapes: 16)
