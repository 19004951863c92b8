"""Checkpoints of a PPO run: each whole or not there, whatever moment the process or the disk chose to give up."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import atomic_folder, atomic_write_json

logger = logging.getLogger(__name__)

KEPT = 2  # besides the last good one: the newest may be of a policy that has just gone wrong
_NAME = re.compile(r"step-(\d{6,})")


class Saved(NamedTuple):
    """What a checkpoint holds: the policy's trained tensors, the optimizer's state, and small state, as JSON has it."""

    policy: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The folders `folder`/step-%06d, where step counts the updates that were done.

    A folder appears by one rename, after its files are on the disk. state.json holds the size of state.pt: a folder in
    which the two do not agree was cut short (by a copy, or a broken disk) and is passed over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (
            ".step-*.tmp",
            ".step-*.old",
        ):  # what a kill left of a folder that was being written or replaced
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def path(self, step: int) -> Path:
        """The folder of `step`."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The whole checkpoints, ascending."""
        found = [match for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return sorted(step for match in found if self._whole(step := int(match[1])))

    def _whole(self, step: int) -> bool:
        path = self.path(step)
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            whole = bool((path / "state.pt").stat().st_size == state["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            logger.warning("checkpoints: %s was cut short and is passed over", path)
        return whole

    def save(self, step: int, saved: Saved) -> None:
        """Write the checkpoint of `step`.

        Raises:
            OSError: one sentence, if it could not be written (a full disk, say); what was there stays as it was.
        """
        try:
            with atomic_folder(self.path(step)) as temporary:
                file = temporary / "state.pt"
                with file.open("wb") as stream:  # whose errors, unlike those of torch's own writer, say why
                    torch.save({"policy": saved.policy, "optimizer": saved.optimizer}, stream)
                atomic_write_json(temporary / "state.json", {**saved.state, "step": step, "bytes": file.stat().st_size})
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
            kept = self.steps()
            cause = _cause(error)
            raise OSError(
                f"output: the checkpoint of step {step} could not be written to {self.folder} ({cause}); "
                + (f"the last whole one is of step {kept[-1]}" if kept else "none was written before")
                + "; make room and go on with --resume"
            ) from error

    def load(self, step: int) -> Saved:
        """The checkpoint of `step`, its tensors on the CPU."""
        path = self.path(step)
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Saved(tensors["policy"], tensors["optimizer"], state)

    def last_good(self, bad_since: int | None) -> int | None:
        """The newest checkpoint from before step `bad_since`; None if there is none.

        The checkpoint of step s holds the policy that step s samples from: it is good if step s still was.
        """
        return max((step for step in self.steps() if bad_since is None or step < bad_since), default=None)

    def prune(self, bad_since: int | None) -> None:
        """Remove all but the newest two and the last good one."""
        steps = self.steps()
        keep = {*steps[-KEPT:], self.last_good(bad_since)}
        for step in steps:
            if step not in keep:
                # out of sight first: a kill while files go must not leave half a checkpoint under a good name
                retired = self.path(step).with_name(f".{self.path(step).name}.old")
                os.replace(self.path(step), retired)
                shutil.rmtree(retired, ignore_errors=True)


def _cause(error: BaseException) -> str:
    """What the system said, where it is behind `error`; else its first line."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno:
            return os.strerror(behind.errno)
        behind = behind.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
