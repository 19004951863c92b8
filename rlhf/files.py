"""Files that are either there and whole, or not there: what makes a killed job resumable."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    # a sibling, because a rename is atomic only within one file system; the process id keeps two writers apart
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling to write; on a clean exit it becomes `path`, on an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 `text` to `path` as one step: a reader, or a resumed job, sees the old file or the new one."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_json(path: Path | str, value: Any) -> None:
    """`atomic_write_text` of `value` as indented JSON; ValueError on NaN or infinity, which JSON cannot say."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on a clean exit it becomes `path`, on an error it is removed.

    An existing folder `path` is replaced: it stays whole until the new one is, then gives way by two renames.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        for entry in sorted(temporary.rglob("*")):
            _sync(entry)
        _sync(temporary)
        retired = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
        _sync(path.parent)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
