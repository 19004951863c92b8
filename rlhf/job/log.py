"""Log a run's metrics to JSON lines and, if it is installed, TensorBoard."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .files import read_json_lines, repaired_json_lines, writing


class RunLog:
    """Append to `folder`/metrics.jsonl, one object per call, and to `folder`/tensorboard/ if TensorBoard is installed.

    A resumed run repeats the steps after its last checkpoint, so a row whose step and names are in the file already is
    not written again. An unfinished last line of a killed process is cut off.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self._seen = {(row.get("step"), *sorted(row.keys())) for row in repaired_json_lines(self.path)}
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(self.folder / "tensorboard"))

    def metrics(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Record `values` at `step`, each name after `prefix` and a slash; a value that is not finite becomes null."""
        row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        for name, value in values.items():
            number = float(value)
            row[f"{prefix}/{name}" if prefix else name] = number if math.isfinite(number) else None
        key = (row["step"], *sorted(row.keys()))
        if key in self._seen:
            return
        self._seen.add(key)
        with writing(self.path):
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        if self._board is not None:
            with writing(self.folder / "tensorboard"):
                for name, value in list(row.items())[2:]:
                    if value is not None:
                        self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush to disk and close; safe to call twice."""
        board, self._board = self._board, None
        if not self._file.closed:
            with writing(self.path), self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        if board is not None:
            with writing(self.folder / "tensorboard"):
                board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    """Return the rows of `folder`/metrics.jsonl; see `read_json_lines`."""
    return read_json_lines(Path(folder) / "metrics.jsonl")


@contextmanager
def muted(name: str) -> Iterator[None]:
    """Silence the warnings of the logger `name` for a block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def say_once(line: str) -> None:
    """Print `line` on stderr above any progress bar; a process prints the same line once."""
    tqdm.write(line, file=sys.stderr)
