"""The counters that a call gets. Tests of their alignment and of graph replay need a GPU: */triton*_cases.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from prudent.kernels import arrivals
from prudent.kernels.ensemble_reward import configs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_made_yet() -> Iterator[None]:
    with mock.patch.dict(arrivals._free, clear=True), mock.patch.dict(arrivals._of_stream, clear=True):
        yield


def test_a_stream_keeps_its_row_and_shares_it_with_nobody() -> None:
    first, second = arrivals._row(CPU, 1), arrivals._row(CPU, 2)
    assert arrivals._row(CPU, 1).data_ptr() == first.data_ptr() != second.data_ptr()


def test_every_captured_call_has_a_row_of_its_own() -> None:
    rows = [arrivals._row(CPU, 1), *(arrivals._row(CPU, None) for _ in range(arrivals.ROWS + 3))]
    assert len({row.data_ptr() for row in rows}) == len(rows)
    assert not any(row.any() for row in rows)


def test_every_row_is_aligned_as_a_first_tensor_is() -> None:
    """Triton compiles again for a pointer that is not a multiple of 16 bytes, and compiling breaks a capture."""
    for row in (arrivals._row(CPU, 1), *(arrivals._row(CPU, None) for _ in range(arrivals.ROWS))):
        assert row.data_ptr() % 16 == 0


def test_there_are_counters_for_every_split_block() -> None:
    assert arrivals.COUNTERS >= 1 + configs.MAX_SPLIT_BLOCKS
    assert arrivals.arrivals(CPU, 1 + configs.MAX_SPLIT_BLOCKS).tolist() == [0] * (1 + configs.MAX_SPLIT_BLOCKS)


def test_in_a_capture_nothing_is_allocated_for_later() -> None:
    assert arrivals._row(CPU, None).tolist() == [0] * arrivals.COUNTERS
    assert not arrivals._free


def test_what_lasts_is_allocated_outside_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    real = arrivals._zero_rows

    def watched(device: torch.device) -> list[torch.Tensor]:
        threads.append(threading.current_thread())
        return real(device)

    monkeypatch.setattr(arrivals, "_zero_rows", watched)
    with torch.inference_mode():  # which the rows would otherwise carry on
        row = arrivals._row(CPU, 1)
    assert threads[0] is not threading.current_thread()
    assert not row.is_inference()


def test_only_amd_waits_for_its_stores() -> None:
    assert arrivals.stores_done(arrivals.architecture(CPU)) == arrivals.stores_done("sm_90") == ""
    assert arrivals.stores_done("gfx942") == "s_waitcnt vmcnt(0)"


def test_the_architecture_of_an_amd_device_is_read_without_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = mock.Mock(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert arrivals.architecture.__wrapped__(torch.device("cuda", 0)) == "gfx942"


def test_an_unknown_amd_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"arrivals: device: expected an AMD GPU of gfx9, gfx11, gfx12, got gfx1310"):
        arrivals.stores_done("gfx1310")
