"""Run `prudent train`: train a pessimistic reward model on preference pairs, in two stages, in one run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..evaluation.statistics import accuracy_difference, group_labels, pair_accuracy
from ..job.files import atomic_write_json
from ..job.folder import locked_folder
from ..job.log import RunLog
from .config import TrainConfig, refuse_unread
from .frozen import train_frozen
from .outcome import TrainResult, open_folder
from .run import Run, Scored, Sides
from .train_card import write_cards
from .trained import train_whole

__all__ = ["TrainConfig", "TrainResult", "run_train"]


def run_train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> TrainResult:
    """Train a reward model on preference pairs.

    The run folder (`config.output`): config.yaml (resolved), data.json (counts), metrics.jsonl, tensorboard/,
    features/, checkpoints/, stage1/ (the single-head model: its reward differences are Bradley-Terry logits), model/
    (the final model, calibrated on training features, with its tokeniser), adapter/ (mode lora: the final model's LoRA,
    unmerged, and its heads: `reward_adapter`), train.json (final metrics; written last). Stage pet adds reference/ (the
    samples it is pessimistic against) and, for an ensemble trained in this run, start/ (the ensemble before PET);
    model/ keeps the calibration from before PET, so that rewards before and after have one unit. Each model's folder
    has a card, README.md, written when all stages are done.

    Args:
        config: see `TrainConfig`.
        resume: continue a killed run; without a run folder, start one.
        progress: show progress bars on stderr.

    Raises:
        ValueError: for data or a config that cannot be used, including a key that the mode does not read; for an output
            folder that holds another run or other files, or in which another process trains; for a loss that is not
            finite.
        OSError: for a file that cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"train: expected one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}: one process writes the run folder"
        )
    mode = _mode(config)
    refuse_unread(config, mode)
    with locked_folder(config.output):
        finished = open_folder(config, resume)
        if finished is not None:
            return TrainResult(config.output, finished, finished_before=True)
        with RunLog(config.output) as log:
            run = Run(config, mode, log, resume, progress)
            return TrainResult(config.output, _trained(run))


def _mode(config: TrainConfig) -> str:
    """Resolve mode auto on this machine: lora on a GPU unless the stage is pet, else head."""
    if config.mode != "auto":
        return config.mode
    return "lora" if torch.cuda.is_available() and config.stage != "pet" else "head"


def _trained(run: Run) -> dict[str, Any]:
    """Train every stage that is not done yet; write train.json and return its content."""
    parts: dict[str, Any] = {}
    if run.mode == "head":
        scored, parts = train_frozen(run)
    else:
        scored, pet = train_whole(run)
        parts = {} if pet is None else {"pet": pet}
    metrics = {
        "mode": run.mode,
        "train_pairs": len(run.train),
        "held_out_pairs": len(run.held_out),
        "dropped": run.dropped,
        "truncated": run.counts.get("truncated"),
        **(_accuracies(run, scored) if run.held_out else {"accuracy": {}}),
        **parts,
    }
    write_cards(run, metrics)
    atomic_write_json(run.folder / "train.json", metrics)
    return metrics


def _accuracies(run: Run, scored: Mapping[str, Scored]) -> dict[str, Any]:
    """Held-out accuracy of each aggregation of the heads, with its interval over prompts.

    "accuracy": name -> value, low, high. "best": the name of the highest; "minus_best": each other name -> its accuracy
    minus the best's, with the interval of the paired difference.
    """
    rows = _rewards(run, scored)
    prompts = group_labels(pair.prompt_key for pair in run.held_out)
    accuracy = {name: pair_accuracy(*sides, prompts)._asdict() for name, sides in rows.items()}
    best = max(accuracy, key=lambda name: accuracy[name]["value"])
    minus_best = {
        name: accuracy_difference(sides, rows[best], prompts)._asdict() for name, sides in rows.items() if name != best
    }
    return {
        "held_out_prompts": int(prompts.max()) + 1,
        "accuracy": accuracy,
        "best": best,
        "minus_best": minus_best,
    }


def _rewards(run: Run, scored: Mapping[str, Scored]) -> dict[str, Sides]:
    """Name -> rewards of the held-out pairs."""
    result = {"single head (stage 1)": scored["single"].rewards("mean")} if "single" in scored else {}
    heads = scored["final"].head.num_heads
    names = ("nominal", "mean", "min", run.config.aggregation) if heads > 1 else ("mean",)
    labels = {"min": "worst", "mean": "mean of heads"} if heads > 1 else {"mean": "single head"}
    for name in dict.fromkeys(names):
        label = labels.get(name, name)
        if run.config.stage == "pet":
            if heads > 1 or "single" not in scored:
                result[f"{label}, before PET"] = scored["start"].rewards(name)
            result[f"{label}, after PET"] = scored["final"].rewards(name)
        elif heads > 1:
            result[label] = scored["final"].rewards(name)
    return result
