"""PRUDENT_AUTOTUNE=1: what it times and when, and the file of choices. The timer is a fake, so no GPU is needed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from prudent.kernels import tuning
from prudent.kernels.launch import Config

TABLE, OTHER, SLOW = Config(16, 64, 4, 3), Config(32, 64, 4, 3), Config(64, 64, 4, 3)
KEY = ("kernel", "rows<=1024", "D=4096")
DEVICE = torch.device("cuda", 1)


class Timer:
    """A fake GPU: gives the time of a `Config` from a table, and records what was timed."""

    def __init__(self) -> None:
        self.timed: list[Config] = []
        self.device: torch.device | None = None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        self.device = device
        yield
        self.device = None

    def __call__(self, run: Callable[[Config], None], config: Config) -> float:
        assert self.device == DEVICE  # the tensors', not whichever is current
        run(config)
        self.timed.append(config)
        return {TABLE: 2.0, OTHER: 1.0, SLOW: 3.0}[config]


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Timer:
    timer = Timer()
    monkeypatch.setenv("PRUDENT_AUTOTUNE", "1")
    monkeypatch.setenv("PRUDENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_milliseconds", timer)
    monkeypatch.setattr(tuning, "_can_time", lambda device: True)
    monkeypatch.setattr(tuning, "_machine", lambda: ("a device", "torch 2", "triton 3"))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "device", timer.on)
    return timer


def choose(candidates: tuple[Config, ...] = (TABLE, OTHER, SLOW)) -> Config:
    return tuning.choose(TABLE, candidates, KEY, lambda config: None, DEVICE)


def forget_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_chosen", {})


def test_without_the_variable_the_table_serves_and_nothing_is_timed(
    timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (None, "0", ""):
        monkeypatch.delenv("PRUDENT_AUTOTUNE") if value is None else monkeypatch.setenv("PRUDENT_AUTOTUNE", value)
        assert choose() == TABLE
    assert timer.timed == []
    assert not tuning.cache_file().exists()


def test_where_nothing_can_be_timed_the_table_serves(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_can_time", lambda device: False)
    assert choose() == TABLE
    assert timer.timed == []


def test_the_fastest_is_chosen_and_each_candidate_timed_once_in_a_process(timer: Timer) -> None:
    assert [choose() for _ in range(3)] == [OTHER] * 3
    assert sorted(timer.timed) == sorted([TABLE, OTHER, SLOW])


def test_the_tables_own_tile_competes_though_it_is_not_among_the_candidates(timer: Timer) -> None:
    assert choose((SLOW,)) == TABLE
    assert timer.timed == [TABLE, SLOW]


def test_a_choice_outlives_the_process(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    choose()
    forget_the_process(monkeypatch)
    timer.timed.clear()
    assert choose() == OTHER
    assert timer.timed == []


def test_another_device_or_version_is_timed_for_itself(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    choose()
    monkeypatch.setattr(tuning, "_machine", lambda: ("a device", "torch 2", "triton 4"))
    timer.timed.clear()
    choose()
    assert len(timer.timed) == 3
    assert len(json.loads(tuning.cache_file().read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"', "\x00\xff"])
def test_a_broken_file_is_reported_and_written_anew(timer: Timer, content: str) -> None:
    tuning.cache_file().parent.mkdir(parents=True)
    tuning.cache_file().write_text(content)
    with pytest.warns(UserWarning, match=r"tuning: .*tuning\.json: expected a JSON table"):
        assert choose() == OTHER
    assert list(json.loads(tuning.cache_file().read_text()).values()) == [list(OTHER)]
    assert [path.name for path in tuning.cache_file().parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize("stale", [[1, 2, 3, 4], [16, 64], "text", {"a": 1}])
def test_a_choice_that_is_no_longer_a_candidate_is_reported_and_timed_again(
    timer: Timer, stale: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose()
    forget_the_process(monkeypatch)
    name = next(iter(json.loads(tuning.cache_file().read_text())))
    tuning.cache_file().write_text(json.dumps({name: stale, "another": [1, 1, 1, 1]}))
    with pytest.warns(UserWarning, match="expected one of this version's tiles"):
        assert choose() == OTHER
    assert json.loads(tuning.cache_file().read_text()) == {name: list(OTHER), "another": [1, 1, 1, 1]}


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_it(
    timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUDENT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="it is kept for this process only"):
        assert choose() == OTHER
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == OTHER
