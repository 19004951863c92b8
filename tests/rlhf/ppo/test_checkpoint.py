"""Checkpoints: complete or absent; the newest two and the last good one are kept; a full disk is one sentence."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
import signal
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from prudent.rlhf.ppo import checkpoint
from prudent.rlhf.ppo.checkpoint import Checkpoints, Saved, State


def _saved(value: float, size: int = 3) -> Saved:
    optimizer = {"state": {0: {"step": torch.tensor(value), "exp_avg": torch.full((size,), value)}}, "param_groups": []}
    state = State(kl_coef=value, bad_steps=0, rules={}, monitor={"baseline": {}})
    return Saved({"weight": torch.full((size,), value)}, optimizer, state)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "checkpoints")
    kept.save(10, _saved(0.1))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [10]
    step, back = kept.newest()
    assert step == 10
    assert torch.equal(back.policy["weight"], torch.full((3,), 0.1))
    assert back.optimizer["state"][0]["step"] == torch.tensor(0.1)
    assert back.state["kl_coef"] == 0.1


def test_the_newest_two_and_the_last_good_one_stay(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    for step in (0, 10, 20, 30):
        kept.save(step, _saved(step))
    kept.prune(bad_since=11)  # step 10 was good: what it samples from is good
    assert kept.steps() == [10, 20, 30]
    assert kept.last_good(11) == 10
    assert kept.last_good(10) is None  # what a bad step samples from is not
    kept.prune(bad_since=None)
    assert kept.steps() == [20, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020", "step-000030"]


@pytest.mark.parametrize("broken", ["state.pt", "state.json"])
def test_a_checkpoint_cut_short_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(10, _saved(1))
    kept.save(20, _saved(2))
    file = tmp_path / "step-000020" / broken
    file.write_bytes(file.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert kept.steps() == [10]
    assert "step-000020 is damaged (truncated, or its bytes changed): skipped" in caplog.text


def _flip(file: Path, where: int) -> None:
    content = bytearray(file.read_bytes())
    content[where] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize("where", [-1, -30, 700])  # the archive's list of contents, and a tensor in it
def test_a_checkpoint_whose_bytes_changed_is_skipped_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: int
) -> None:
    for step in (10, 20, 30):
        Checkpoints(tmp_path).save(step, _saved(step, size=1000))
    _flip(tmp_path / "step-000030" / "state.pt", where)
    kept = Checkpoints(tmp_path)
    assert kept.steps() == [10, 20, 30]  # its size is right: the bytes are read when it is loaded
    with caplog.at_level(logging.WARNING):
        step, saved = kept.newest()
    assert (step, saved.state["kl_coef"]) == (20, 20)
    assert "step-000030 is damaged" in caplog.text
    assert kept.steps() == [10, 20]
    kept.save(40, _saved(40))
    kept.prune(bad_since=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020", "step-000040"]


def test_a_damaged_checkpoint_that_is_rewritten_loads(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(10, _saved(1))
    _flip(tmp_path / "step-000010" / "state.pt", -1)
    assert kept.newest() is None
    kept.save(10, _saved(2))
    step, saved = kept.newest()
    assert (step, saved.state["kl_coef"]) == (10, 2)


def test_the_newest_checkpoint_before_a_step_is_undamaged(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    for step in (10, 20, 30):
        kept.save(step, _saved(step))
    _flip(tmp_path / "step-000020" / "state.pt", -1)
    assert kept.newest(bad_since=30)[0] == 10
    assert kept.newest(bad_since=10) is None


@pytest.mark.parametrize("text", ["{}", "[]", '{"bytes": 1, "crc32": 2, "kl_coef": 0.1}'])
def test_a_state_that_lacks_something_is_damaged(tmp_path: Path, text: str) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(10, _saved(1))
    kept.save(20, _saved(2))
    (tmp_path / "step-000020" / "state.json").write_text(text)
    assert kept.steps() == [10]


def test_leftovers_of_an_unfinished_checkpoint_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-000010.abc.tmp").mkdir()
    (tmp_path / ".step-000000.old").mkdir()
    (tmp_path / "notes").mkdir()
    assert Checkpoints(tmp_path).steps() == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(10, _saved(1))

    def full(value: Any, file: BinaryIO) -> None:
        file.write(b"half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(
        OSError, match=r"step 20 could not be written .*No space left on device.*complete one is of step 10"
    ):
        kept.save(20, _saved(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]
    assert kept.load(10).state["kl_coef"] == 1


def _save_with_little_room(folder: Path, said: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
    kept = Checkpoints(folder)
    kept.save(10, _saved(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        kept.save(20, _saved(2, size=100_000))
    except OSError as error:
        said.send(str(error))
    else:
        said.send("no error")


def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_save_with_little_room, args=(tmp_path, send))
    child.start()
    assert receive.poll(60)
    sentence = receive.recv()
    child.join()
    assert "checkpoint of step 20 could not be written" in sentence
    assert f"({os.strerror(errno.EFBIG)})" in sentence  # what the system said, not what torch made of it
    assert "the last complete one is of step 10" in sentence
    assert Checkpoints(tmp_path).steps() == [10]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]
