"""Whose an output folder is: a run's from its first bytes on, and nobody else's."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce

from .config import JobConfig, config_keys, load_config
from .files import atomic_write_text


def claim_folder(
    config: JobConfig, made: Collection[str], *, free: Collection[str] = ("output",), resume: bool = True
) -> bool:
    """Whether `config.output` holds this run, begun. If not it is claimed: config.yaml is written.

    A folder with nothing in it but the config of a run that was refused before it computed anything is free for a
    mended command.

    Args:
        config: of the run; one with the key `output`, a folder.
        made: names of files and folders of a run that has begun; an empty file does not count.
        free: top-level keys that may differ from those the run was begun with.
        resume: whether a run that has begun may be gone on with.

    Raises:
        ValueError: for a file, a folder with other files, a run without `resume`, a run with another config.
    """
    folder = config.output  # type: ignore[attr-defined]
    saved = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: expected a folder, got {folder}, which is a file")
    if not saved.exists() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output: expected a new or empty folder or one of a run, got {folder} with other files")
    begun = any(path.is_dir() or (path.exists() and path.stat().st_size) for path in (folder / name for name in made))
    if not (saved.exists() and begun):
        atomic_write_text(saved, config.to_yaml())
        return False
    if not resume:
        raise ValueError(f"output: {folder} holds a run already: go on with it by --resume, or choose another folder")
    before = load_config(type(config), saved)
    changed = [
        f"{key} ({_shown(before, key)} there, {_shown(config, key)} here)"
        for key in config_keys(type(config))
        if key.partition(".")[0] not in free and _shown(before, key) != _shown(config, key)
    ]
    if changed:
        raise ValueError(f"output: {folder} holds a run with another {', '.join(changed)}: choose another folder")
    return True


def _shown(config: JobConfig, key: str) -> str:
    return str(reduce(getattr, key.split("."), config))
