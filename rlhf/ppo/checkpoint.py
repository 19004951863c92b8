"""Checkpoints of a PPO run: each is complete or absent, whenever the process or the disk fails."""

from __future__ import annotations

import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..job.files import atomic_folder, atomic_write_json, cause, read_json

logger = logging.getLogger(__name__)

KEPT = 2  # newest checkpoints; the last good one is kept too, because these may hold a policy that has just gone wrong
_NAME = re.compile(r"step-(\d{6,})")
_CHUNK = 1 << 24  # bytes read at once


class State(TypedDict):
    """The small state of a run, as JSON."""

    kl_coef: float
    bad_steps: int
    rules: dict[str, Any]
    monitor: dict[str, Any]


class Saved(NamedTuple):
    """The content of a checkpoint: the policy's trained tensors, the optimizer's state, and small state."""

    policy: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: State


class Checkpoints:
    """The folders `folder`/step-%06d; step is the number of updates done.

    A folder appears by one rename, after its files are on the disk. state.json holds size and checksum of state.pt; a
    folder in which they do not match is damaged (by a copy, or a broken disk) and is skipped. The size is checked
    whenever checkpoints are listed, the checksum when one is loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: set[int] = set()  # steps known to be damaged
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (
            ".step-*.tmp",
            ".step-*.old",
        ):  # left by a kill while a folder was being written or replaced
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def path(self, step: int) -> Path:
        """The folder of `step`."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps of all undamaged checkpoints, ascending."""
        found = [match for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return sorted(step for match in found if self._whole(step := int(match[1])))

    def _whole(self, step: int) -> bool:
        if step in self._damaged:
            return False
        try:
            written = read_json(self.path(step) / "state.json")
            size = (self.path(step) / "state.pt").stat().st_size
        except (OSError, ValueError):
            return self._pass_over(step)
        needed = {*State.__annotations__, "crc32"}
        return (needed <= written.keys() and size == written.get("bytes")) or self._pass_over(step)

    def _pass_over(self, step: int) -> bool:
        self._damaged.add(step)
        logger.warning("checkpoints: %s is damaged (truncated, or its bytes changed): skipped", self.path(step))
        return False

    def save(self, step: int, saved: Saved) -> None:
        """Write the checkpoint of `step`.

        Raises:
            OSError: if it could not be written (on a full disk, for example); existing checkpoints are unchanged.
        """
        try:
            with atomic_folder(self.path(step)) as temporary:
                file = temporary / "state.pt"
                with file.open("wb") as stream:  # its errors give the reason, unlike those of torch's own writer
                    summed = _Summed(stream)
                    torch.save({"policy": saved.policy, "optimizer": saved.optimizer}, summed)  # type: ignore[arg-type]
                known = {"step": step, "bytes": file.stat().st_size, "crc32": summed.crc32}
                atomic_write_json(temporary / "state.json", {**saved.state, **known})
            self._damaged.discard(step)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
            kept = self.steps()
            raise OSError(
                f"output: the checkpoint of step {step} could not be written to {self.folder} ({cause(error)}); "
                + (f"the last complete one is of step {kept[-1]}" if kept else "none was written before")
                + "; free some space and continue with --resume"
            ) from error

    def newest(self, bad_since: int | None = None) -> tuple[int, Saved] | None:
        """(step, content) of the newest undamaged checkpoint, from before step `bad_since` if given; None without one.

        The checkpoint of step s holds the policy that step s samples from, so it is good if step s was good.
        """
        while (step := self.last_good(bad_since)) is not None:
            saved = self.load(step)
            if saved is not None:
                return step, saved
        return None

    def load(self, step: int) -> Saved | None:
        """The checkpoint of `step`, its tensors on the CPU; None, with a warning, if it is damaged."""
        file = self.path(step) / "state.pt"
        try:
            state: Any = read_json(self.path(step) / "state.json")
            whole = _crc32(file) == state["crc32"]
        except OSError:  # a broken disk
            whole = False
        if not whole:
            self._pass_over(step)
            return None
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return Saved(tensors["policy"], tensors["optimizer"], state)

    def last_good(self, bad_since: int | None) -> int | None:
        """The step of the newest checkpoint from before step `bad_since` that has its full size; None without one."""
        return max((step for step in self.steps() if bad_since is None or step < bad_since), default=None)

    def prune(self, bad_since: int | None) -> None:
        """Remove all but the newest two checkpoints and the last good one, and all that are known to be damaged."""
        steps = self.steps()
        keep = {*steps[-KEPT:], self.last_good(bad_since)}
        for step in (*steps, *self._damaged):
            if step not in keep:
                # renamed first: a kill during the removal must not leave half a checkpoint under a valid name
                retired = self.path(step).with_name(f".{self.path(step).name}.old")
                os.replace(self.path(step), retired)
                shutil.rmtree(retired, ignore_errors=True)
        self._damaged.clear()


class _Summed:
    """A write-only file that computes the checksum of what is written."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.crc32 = stream, 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


def _crc32(file: Path) -> int:
    found = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found
