"""Whose an output folder is: a run's from its first bytes on, one process's at a time, and nobody else's."""

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
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of the run folder `folder`, made if need be, for the length of a block.

    The lock is the system's: it goes with the process, however that ends. A file system that has none keeps nobody out.

    Raises:
        ValueError: for a file, and where another process holds the folder.
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


def claim_folder(
    config: JobConfig, made: Collection[str], *, free: Collection[str] = ("output",), resume: bool = True
) -> bool:
    """Whether `config.output` holds this run, begun. If not it is claimed: config.yaml is written.

    A folder with nothing in it but the config of a run that was refused before it computed anything is free for a
    mended command. What a killed process left half written in a run's folder is removed, so call it inside `held`.

    Args:
        config: of the run; one with the key `output`, a folder.
        made: see `begun`.
        free: keys, or groups of keys, that may differ from those the run was begun with.
        resume: whether a run that has begun may be gone on with.

    Raises:
        ValueError: for a file, a folder with other files, a run without `resume`, a run with another config.
    """
    folder = config.output  # type: ignore[attr-defined]
    saved = folder / "config.yaml"
    _refuse_file(folder)
    if not saved.exists() and folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"output: expected a new or empty folder or one of a run, got {folder} with other files")
    if not (saved.exists() and begun(folder, made)):
        atomic_write_text(saved, config.to_yaml())
        return False
    if not resume:
        raise ValueError(f"output: {folder} holds a run already: go on with it by --resume, or choose another folder")
    before = load_config(type(config), saved)
    changed = [
        f"{key} ({_shown(before, key)} there, {_shown(config, key)} here)"
        for key in config_keys(type(config))
        if not {key, key.partition(".")[0]} & set(free) and _shown(before, key) != _shown(config, key)
    ]
    if changed:
        raise ValueError(f"output: {folder} holds a run with another {', '.join(changed)}: choose another folder")
    _sweep(folder)
    return True


def begun(folder: Path, made: Collection[str]) -> bool:
    """Whether `folder` has any of `made`: names, or patterns, of what a run makes; an empty file does not count."""
    return any(path.is_dir() or path.stat().st_size for name in made for path in folder.glob(name))


def _refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: expected a folder, got {folder}, which is a file")


def _sweep(folder: Path) -> None:
    """Remove what `atomic_file` and `atomic_folder` left of a process that was killed."""
    for pattern in (".*.tmp", ".*.old"):
        for leftover in folder.glob(pattern):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _shown(config: JobConfig, key: str) -> str:
    return str(reduce(getattr, key.split("."), config))
