"""Say beside an output file how it was made, so that an interrupted job is continued with the same settings only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json


def record_path(output: Path | str) -> Path:
    """`<output>.config.json`."""
    return Path(f"{output}.config.json")


def refuse_to_replace(output: Path | str) -> None:
    """Raise ValueError: the output exists, and neither resume nor overwrite was asked for."""
    raise ValueError(f"output: {output} exists already; resume it, overwrite it, or choose another output")


def refuse_other_settings(output: Path | str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless the record says that the output was made with these settings."""
    record = record_path(output)
    if not record.exists():
        raise ValueError(f"output: {output} cannot be resumed: {record.name}, which says how it was made, is missing")
    before = read_json(record)
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise ValueError(f"output: {output} cannot be resumed: it was made with another {', '.join(changed)}")
