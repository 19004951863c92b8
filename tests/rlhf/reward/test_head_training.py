"""The checkpoint of head training: resumed from if it is complete, ignored with a warning if it is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prudent.rlhf.reward.fit import BradleyTerryConfig, fit_heads


@pytest.mark.parametrize("cut", [lambda b: b[:-100], lambda b: b[:5], lambda b: b"", lambda b: bytes(len(b))])
def test_a_checkpoint_that_is_incomplete_is_named_and_its_stage_starts_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: Callable[[bytes], bytes]
) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(8, 4, generator=generator) for _ in range(2))
    file, config = tmp_path / "bt.pt", BradleyTerryConfig(epochs=2)
    whole = fit_heads(chosen, rejected, config, checkpoint=file, progress=False)
    file.write_bytes(cut(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again = fit_heads(chosen, rejected, config, checkpoint=file, progress=False)
    assert f"{file}: its weights cannot be read (" in caplog.text
    assert "the stage restarts" in caplog.text
    assert torch.equal(again.head.weight, whole.head.weight)
    assert len(again.history) == 2
    assert torch.load(file, weights_only=True)["epoch"] == 2
