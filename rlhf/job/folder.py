"""Open and lock an output folder: one run, one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import IO

from .config import JobConfig, config_keys, load_config
from .files import atomic_write_text

try:
    import fcntl
except ImportError:  # not on Windows: there two processes in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` if needed and lock it against other processes for the length of the block.

    The operating system holds the lock and frees it when the process ends, however it ends. On a file system without
    locks the folder is not protected.

    Raises:
        ValueError: if `folder` is a file, or if another process has locked it.
    """
    _refuse_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder / LOCK)
    try:
        yield
    finally:
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it is gone
            lock.close()


def _locked(path: Path) -> IO[str] | None:
    """The lock file, open and locked; None where the system has no locks, or `path` cannot be written."""
    while fcntl is not None:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                who = file.read() or "unknown"
            raise ValueError(f"output: {path.parent} is being written by process {who}") from None
        except OSError:
            file.close()
            return None
        if _is_there(file, path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()  # of one who has just let go and removed it
    return None


def _is_there(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def open_run_folder(
    config: JobConfig,
    run_files: Collection[str],
    *,
    resumable_changes: Collection[str] = ("output",),
    resume: bool = True,
) -> bool:
    """Return True if `config.output` holds this run already; otherwise write config.yaml there and return False.

    A folder whose run was refused before it computed anything holds config.yaml alone; a corrected command may use it.
    Half-written files of a killed process are removed, so call this inside `locked_folder`.

    Args:
        config: of the run; `config.output` is its folder.
        run_files: see `has_run_files`.
        resumable_changes: keys, or groups of keys, that may differ from those that the run started with.
        resume: whether a run that has started may be continued.

    Raises:
        ValueError: for a file, a folder with other files, a started run without `resume`, a run with another config.
    """
    folder = config.output  # type: ignore[attr-defined]
    saved = folder / "config.yaml"
    _refuse_file(folder)
    if not saved.exists() and folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"output: expected a new or empty folder or one of a run, got {folder} with other files")
    if not (saved.exists() and has_run_files(folder, run_files)):
        atomic_write_text(saved, config.to_yaml())
        return False
    if not resume:
        raise ValueError(f"output: {folder} holds a run already: continue it with --resume, or choose another folder")
    before = load_config(type(config), saved)
    changed = [
        f"{key} ({_value(before, key)} there, {_value(config, key)} here)"
        for key in config_keys(type(config))
        if not {key, key.partition(".")[0]} & set(resumable_changes) and _value(before, key) != _value(config, key)
    ]
    if changed:
        raise ValueError(f"output: {folder} holds a run with another {', '.join(changed)}: choose another folder")
    _remove_leftovers(folder)
    return True


def has_run_files(folder: Path, run_files: Collection[str]) -> bool:
    """Return whether `folder` holds a run that has started: a folder or non-empty file that `run_files` names.

    run_files: names or glob patterns of what the run writes once it computes.
    """
    return any(path.is_dir() or path.stat().st_size for name in run_files for path in folder.glob(name))


def _refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: expected a folder, got {folder}, which is a file")


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that `atomic_file` and `atomic_folder` of a killed process left behind."""
    for pattern in (".*.tmp", ".*.old"):
        for leftover in folder.glob(pattern):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _value(config: JobConfig, key: str) -> str:
    return str(reduce(getattr, key.split("."), config))
