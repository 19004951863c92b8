"""Atomic writes are whole or not there, failed writes are explained, and broken JSON is located."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prudent.rlhf.job.files import (
    atomic_file,
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    cause,
    explain_os_error,
    read_json,
    read_json_lines,
    repaired_json_lines,
    writing,
)


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "note.txt"
    atomic_write_text(target, "one")
    atomic_write_text(target, "zwei ü\n")
    assert target.read_text(encoding="utf-8") == "zwei ü\n"
    assert [p.name for p in target.parent.iterdir()] == ["note.txt"]


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic_write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        atomic_write_json(target, {"a": float("nan")})
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [target]


def _fill_and_fail(target: Path) -> None:
    with atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(RuntimeError, match="killed"):
        _fill_and_fail(target)
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "weights").read_text() == "1"


def test_an_existing_folder_survives_a_failure_and_is_replaced_by_success(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(RuntimeError, match="killed"):
        _fill_and_fail(target)
    assert [p.name for p in target.iterdir()] == ["old"]
    with atomic_folder(target) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_has_the_mode_that_the_umask_asks_for_safetensors_too(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            save_file({"a": torch.zeros(1)}, folder / "weights.safetensors")
            (folder / "config.json").write_text("{}")
        with atomic_file(tmp_path / "shard.safetensors") as file:
            save_file({"a": torch.zeros(1)}, file)
    finally:
        os.umask(before)
    written = [*(tmp_path / "model").iterdir(), tmp_path / "shard.safetensors"]
    assert [path.stat().st_mode & 0o777 for path in written] == [mode] * 3
    assert (tmp_path / "model").stat().st_mode & 0o666 == mode


_LARGE = {"a": torch.zeros(100_000)}


def _safetensors_in_a_folder(path: Path) -> None:
    with atomic_folder(path) as folder:
        save_file(_LARGE, folder / "weights.safetensors")


def _copied_into_a_folder(path: Path) -> None:
    (path.parent / "source").mkdir()
    for part in (path.parent / "source" / "a", path.parent / "source" / "b"):
        part.write_bytes(bytes(15_000))
    with (path.parent / "source" / "c").open("wb") as sparse:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
        sparse.truncate(200_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 10**6))
    with atomic_folder(path) as folder:
        shutil.copytree(path.parent / "source", folder, dirs_exist_ok=True)


def _torch_in_a_file(path: Path) -> None:
    with atomic_file(path) as file, file.open("wb") as stream:
        torch.save(_LARGE, stream)


def _text(path: Path) -> None:
    atomic_write_text(path, "x" * 100_000)


def _log(path: Path) -> None:
    with writing(path), path.open("w") as file:
        file.write("x" * 100_000)
        file.flush()


def _with_little_room(write: Callable[[Path], None], path: Path, said: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 10**6))
    try:
        write(path)
    except OSError as error:
        said.send((error.errno, error.strerror, error.filename))
    except BaseException as error:
        said.send((type(error).__name__, str(error)))


@pytest.mark.parametrize("write", [_safetensors_in_a_folder, _copied_into_a_folder, _torch_in_a_file, _text, _log])
def test_a_disk_that_takes_no_more_is_said_in_the_systems_words_with_the_path_that_was_asked_for(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "target"
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_with_little_room, args=(write, path, send))
    child.start()
    assert receive.poll(60)
    number, words, file = receive.recv()
    child.join()
    reason = os.strerror(errno.EFBIG)
    assert (number, words, file) == (errno.EFBIG, f"could not be written ({reason})", str(path))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def _raise_in(path: Path, error: Exception) -> None:
    with atomic_folder(path):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "some/source"),
        OSError("nowhere is no hub name"),
    ],
)
def test_an_error_that_is_not_of_the_writing_is_passed_on_as_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        _raise_in(tmp_path / "model", error)
    assert raised.value is error


def test_torchs_own_writer_which_says_nothing_is_put_into_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not be written \(is the disk full\?\)") as raised, writing(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    assert raised.value.filename == str(tmp_path)


@pytest.mark.parametrize(
    ("file", "output", "says"),
    [
        ("runs/a", "runs/a", "output: runs/a: No space left on device"),
        ("runs/a/model/x", Path("runs/a/"), "output: runs/a/model/x: No space left on device"),
        ("runs", "runs/a/b", "output: runs: No space left on device"),
        ("out.jsonl.config.json", "./out.jsonl", "output: out.jsonl.config.json: No space left on device"),
        (None, "runs/a", "output: runs/a: No space left on device"),
        ("runs/ab", "runs/a", "runs/ab: No space left on device"),
        ("cache/x", "runs/a", "cache/x: No space left on device"),
        ("cache/x", None, "cache/x: No space left on device"),
        (None, None, "No space left on device"),
    ],
)
def test_what_the_system_said_stands_behind_the_path_and_that_behind_its_key(
    file: str | None, output: str | Path | None, says: str
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", *([] if file is None else [file]))
    assert explain_os_error(error, output) == says
    assert explain_os_error(OSError("output: a sentence"), output) == "output: a sentence"


def test_the_cause_is_the_systems_words_or_else_the_first_line() -> None:
    assert cause(OSError(errno.ENOSPC, "anything")) == os.strerror(errno.ENOSPC)
    assert cause(ValueError("serializing: I/O error: no room (os error 28)")) == os.strerror(28)
    assert cause(ValueError("one\ntwo")) == "one"
    assert cause(EOFError()) == "EOFError"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{broken", "got broken JSON (Expecting property name"),
        (b"", "got nothing"),
        (b"[1, 2]", "got a list"),
        (b'{"a": "\xff"}', "got bytes that are not UTF-8 (invalid start byte at byte 7)"),
    ],
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    whole, log = tmp_path / "a.json", tmp_path / "log.jsonl"
    whole.write_bytes(content)
    log.write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match="expected a JSON object") as raised:
        read_json(whole)
    assert str(raised.value).startswith(f"{whole}: expected a JSON object, {says}")
    with pytest.raises(ValueError, match="remove the line") as raised:
        read_json_lines(log)
    assert str(raised.value).startswith(f"{log}, line 2: expected a JSON object, {says}")


@pytest.mark.parametrize("torn", [b"", b'{"step": 2, "lo', b'"\xff', b"["])
def test_a_log_is_read_up_to_the_line_that_a_kill_cut_short(tmp_path: Path, torn: bytes) -> None:
    log = tmp_path / "log.jsonl"
    line = json.dumps({"step": 1}).encode() + b"\n"
    assert read_json_lines(log) == repaired_json_lines(log) == []
    assert not log.exists()
    log.write_bytes(line + torn)
    assert read_json_lines(log) == [{"step": 1}]
    assert log.read_bytes() == line + torn  # a reader changes nothing: the run may be writing
    assert repaired_json_lines(log) == [{"step": 1}]
    assert log.read_bytes() == line
    log.write_bytes(torn)
    assert repaired_json_lines(log) == []
    assert log.read_bytes() == b""
