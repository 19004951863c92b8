"""Run a study and write NAME.json, NAME.md and NAME.png into its folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..job.config import JobConfig, config_keys
from ..job.files import atomic_write_json, atomic_write_text
from ..job.folder import locked_folder, open_run_folder
from ..report.style import require_matplotlib, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_FLAGS = ("model", "seeds")  # always part of the command


def command(study: str, config: JobConfig) -> str:
    """The shell command that reproduces the results of `config`: all changed keys except `output`."""
    kind = type(config)
    needed = {name: getattr(config, name) for name, field in kind.model_fields.items() if field.is_required()}
    plain, words = kind.model_validate(needed), ["prudent", "study", study]
    for key in config_keys(kind):
        default, value = (reduce(getattr, key.split("."), c) for c in (plain, config))
        if key in _FLAGS and value is not None:
            words += [f"--{key}", str(value)]
        elif value != default and key != "output":
            words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"]
    return shlex.join(words)


_RESULT_FILES = ("*.json*", "*/")  # a folder with any of these holds results


@dataclass(frozen=True)
class StudyResult:
    """The folder of NAME.json, .md and .png; the content of NAME.json; and as text NAME.md and the picture's path."""

    folder: Path
    metrics: dict[str, Any]
    text: str

    def __str__(self) -> str:
        return self.text


def run_study(
    name: str,
    config: JobConfig,
    measure: Callable[[], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
    picture: Callable[[dict[str, Any]], Figure],
    *,
    resumable_changes: Collection[str] = ("output",),
) -> StudyResult:
    """Call `measure`, and write config.yaml, the result, its table and its picture into `config.output`.

    Args:
        config: of the study; its key `output` is a folder.
        resumable_changes: keys that may differ from those of the results in the folder.

    Raises:
        ValueError: for a folder that holds other files, or this study with another config.
        ImportError: naming the extra, if matplotlib is not installed.
    """
    require_matplotlib()
    folder: Path = config.output  # type: ignore[attr-defined]
    with locked_folder(folder):
        if open_run_folder(config, _RESULT_FILES, resumable_changes=resumable_changes):
            atomic_write_text(folder / "config.yaml", config.to_yaml())
        metrics = measure()
        table = markdown(metrics)
        atomic_write_json(folder / f"{name}.json", metrics)
        atomic_write_text(folder / f"{name}.md", table)
        save_png(picture(metrics), folder / f"{name}.png")
    return StudyResult(folder, metrics, f"{table}\n{folder / f'{name}.png'}")
