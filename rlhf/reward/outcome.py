"""Open the run folder of `prudent train`, and format its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..job.files import read_json
from ..job.folder import open_run_folder
from ..report.fit import fit_sentence
from ..report.words import accuracy_cells, aligned, count, few_prompts, truncated_texts
from .config import TrainConfig

_DROPPED = {
    "bad_rows": "broken rows skipped",
    "duplicates": "duplicate pairs dropped",
    "equal": "pairs of two equal responses dropped",
    "below_gap": "pairs below min_score_gap dropped",
}


@dataclass(frozen=True)
class TrainResult:
    """folder: the run folder. metrics: the content of train.json. finished_before: the run was finished already."""

    folder: Path
    metrics: dict[str, Any]
    finished_before: bool = False

    def __str__(self) -> str:
        m = self.metrics
        head = "was finished before; nothing to do" if self.finished_before else "finished"
        pairs = count(m["train_pairs"], "pair")
        lines = [f"{self.folder}: {head}", f"{pairs} trained on, {m['held_out_pairs']} held out"]
        lines += [f"{what}: {m['dropped'][key]}" for key, what in _DROPPED.items() if m["dropped"][key]]
        lines += _truncation_lines(m.get("truncated"))
        lines += [fit_sentence(m["fit"])] if "fit" in m else []
        lines += _accuracy_lines(m) if m["accuracy"] else []
        lines += pet_lines(m["pet"]) if "pet" in m else []
        lines.append(f"model: {self.folder / 'model'}")
        return "\n".join(lines)


def _truncation_lines(cut: dict[str, Any] | None) -> list[str]:
    """Say how many texts were too long, and how many pairs are equal after the cut; no line if no text was too long."""
    if cut is None or not cut["texts"]:
        return []
    lines = [f"{truncated_texts(cut['texts'], cut['of'])} (max_length {cut['max_length']})"]
    if cut["same_pairs"]:
        lines.append(f"pairs whose two texts are equal after the cut: {cut['same_pairs']}")
    return lines


def _accuracy_lines(m: dict[str, Any]) -> list[str]:
    """The table of held-out accuracies, and the rows that so few pairs cannot distinguish from the best."""
    rows = [["held-out accuracy, %", "", "95 % interval"]]
    rows += [[f"  {name}", *accuracy_cells(found)] for name, found in m["accuracy"].items()]
    lines = aligned(rows).splitlines()
    warning = few_prompts(m["held_out_prompts"])  # intervals that are too narrow prove no difference
    alike = [name for name, found in m["minus_best"].items() if warning or found["high"] is None or found["high"] >= 0]
    if alike:
        held_out = f"{count(m['held_out_pairs'], 'pair')} of {count(m['held_out_prompts'], 'prompt')}"
        all_rows = len(alike) + 1 == len(m["accuracy"])
        which = "these rows apart" if all_rows else f"the best, {m['best']}, from {', '.join(alike)}"
        lines.append(f"{held_out} are too few to tell {which}")
    return [*lines, warning] if warning else lines


def pet_lines(pet: dict[str, Any]) -> list[str]:
    """The numbers before and after PET, with warnings."""
    before, after = pet["before"], pet["after"]
    rows = [("gap, best of n - reference", "gap"), ("Bradley-Terry loss", "bt"), ("accuracy", "accuracy")]
    prompts = count(pet["prompts"], "prompt")
    lines = [f"PET on {prompts}, n = {pet['samples']}, beta = {pet['beta']:g}; before -> after"]
    for side, prefix in (("training", ""), ("held-out", "eval_")):
        lines += [
            f"  {f'{side} {name}':<38}{before[prefix + key]:>8.3f} -> {after[prefix + key]:.3f}"
            for name, key in rows
            if prefix + key in after
        ]
    if pet["prompts_too_long"]:
        lines.append(f"prompts too long for a response: {pet['prompts_too_long']}")
    if after["gap"] < 0:
        lines.append(
            "warning: the reference responses now score above the best of the policy's own, so the reward tells the "
            "two sources apart, which lowers the objective without bound; pet.hinge=all or pet.reference=sample "
            "prevents this"
        )
    return lines


# keys that a resumed run may change; a lower batch_tokens helps a run that was killed for memory
RESUMABLE_CHANGES = ("output", "batch_tokens")
RUN_FILES = ("metrics.jsonl", "features", "checkpoints", "stage1", "train.json")  # each shows that a run has begun


def open_folder(config: TrainConfig, resume: bool) -> dict[str, Any] | None:
    """Open the output folder; return the final metrics if the run in it is finished, else None."""
    if not open_run_folder(config, RUN_FILES, resumable_changes=RESUMABLE_CHANGES, resume=resume):
        (config.output / "data.json").unlink(missing_ok=True)  # of a run that was refused
        return None
    done = config.output / "train.json"
    return read_json(done) if done.exists() else None
