"""Open a PPO run's folder, check whether the run in it is finished, and summarise its outcome."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..job.files import atomic_write_text, read_json
from ..job.folder import open_run_folder
from ..report.words import count
from .config import RESUMABLE_CHANGES, PPOConfig

# a folder with any of these holds a run that has begun; the checkpoint of step 0 alone may come from another command
RUN_FILES = ("metrics.jsonl", "ppo.json", "checkpoints/step-*[1-9]*")


@dataclass(frozen=True)
class PPOResult:
    """folder: the run folder. metrics: the content of ppo.json. finished_before: the run was finished already."""

    folder: Path
    metrics: dict[str, Any]
    finished_before: bool = False

    def __str__(self) -> str:
        m = self.metrics
        done = f"{count(m['steps'], 'step')} done"
        head = "was finished before; nothing to do" if self.finished_before else done
        lines = [f"{self.folder}: {head}", *([f"stopped early: {m['stopped']}"] if m["stopped"] else [])]
        lines += [m["faults"]] if m["faults"] else []
        lines += [f"{key}: broken rows skipped: {bad}" for key, bad in m.get("bad_rows", {}).items() if bad]
        if m["rolled_back_to"] is not None:
            lines.append(f"first and last step, before the policy was rolled back to step {m['rolled_back_to']}:")
        shown = [name for name, value in m["last"].items() if value is not None and m["first"].get(name) is not None]
        lines += [f"  {name:<20} {m['first'][name]:>9.3f} -> {m['last'][name]:.3f}" for name in shown]
        lines.append(f"policy: {self.folder / 'policy'}")
        return "\n".join([*lines, *([f"report: {self.folder / 'report.html'}"] if m["report"] else [])])


def open_folder(config: PPOConfig, resume: bool) -> dict[str, Any] | None:
    """Open the output folder; return the content of ppo.json if the run in it is finished and complete, else None.

    Raises:
        ValueError: for a folder with other files, a run without `resume`, or a run with another config.
    """
    folder = config.output
    if not open_run_folder(config, RUN_FILES, resumable_changes=RESUMABLE_CHANGES, resume=resume):
        # remove what a command with another config left before its first step: texts and the checkpoint of step 0
        (folder / "samples.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints" / "step-000000", ignore_errors=True)
        return None
    outcome = _outcome(folder)
    if outcome is not None and outcome["stopped"] is None and config.steps > outcome["steps"]:
        outcome = None  # more steps are requested
    if outcome is None:
        atomic_write_text(folder / "config.yaml", config.to_yaml())
    return outcome


def _outcome(folder: Path) -> dict[str, Any] | None:
    """The content of ppo.json; None if it or a file that it names is missing: the run then resumes and writes both."""
    try:
        found = read_json(folder / "ppo.json")
    except (OSError, ValueError):
        return None
    if not {"steps", "stopped", "rolled_back_to", "first", "last", "report", "faults"} <= found.keys():
        return None
    there = any((folder / "policy").glob("*")) and (not found["report"] or (folder / "report.html").exists())
    return found if there else None
