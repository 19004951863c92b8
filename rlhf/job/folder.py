"""Open and lock an output folder: one run, one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path

from filelock import FileLock, Timeout

from .config import JobConfig, config_keys, load_config
from .files import atomic_write_text

_LOCK, _OWNER = ".lock", ".lock.pid"
_WAIT = 0.2  # seconds: a process that ends removes its lock file, and the next one must create it again


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` if needed and lock it against other processes for the length of the block.

    The operating system frees the lock when the process ends, however it ends: files .lock and .lock.pid that a killed
    process left behind lock nothing. A file system without locks, or a folder that cannot be written, is not protected.

    Raises:
        ValueError: if `folder` is a file, or if it is locked already.
    """
    _refuse_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / _LOCK, timeout=_WAIT), folder / _OWNER
    try:
        lock.acquire()
        owner.write_text(str(os.getpid()), encoding="utf-8")
    except Timeout:
        process = ""
        with suppress(OSError):  # the other process has just ended, or not written its number yet
            process = owner.read_text(encoding="utf-8")
        raise ValueError(f"output: {folder} is being written by process {process or 'unknown'}") from None
    except OSError:  # no locks here, or no permission to write
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            for file in (owner, folder / _LOCK):
                with suppress(OSError):  # Windows removes no open file; there filelock does it
                    file.unlink()
            lock.release()


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
