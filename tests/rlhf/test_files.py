"""Atomic writes: whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from prudent.rlhf.files import atomic_folder, atomic_write_json, atomic_write_text


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
