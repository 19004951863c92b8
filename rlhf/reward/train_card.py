"""The cards of the models that `prudent train` saves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ... import __version__
from ...engine import EnsembleRewardConfig
from ..job.command import command_of
from ..report.card import write_card
from ..report.fit import fit_sentence
from ..report.words import accuracy_cells, count, few_prompts, markdown_table
from .card import BEFORE_PET, CALIBRATED, KEPT, LOGITS, Facts, Region, reward_card
from .config import TrainConfig
from .outcome import pet_lines
from .run import Run
from .trained import CALIBRATION_PAIRS

logger = logging.getLogger(__name__)

_FLAGS = ("model", "data", "output", "stage", "stage1")
_MODES = {
    "head": "the language model stayed as it was, and the heads were trained on its hidden states",
    "lora": "a LoRA of the language model was trained with the heads, and merged into it",
    "full": "the language model was trained with the heads",
}


def write_cards(run: Run, metrics: Mapping[str, Any]) -> None:
    """Write the card of each model in the run's folder; one that was edited stays.

    metrics: the content of train.json.
    """
    for name in ("stage1", "start", "model", "adapter"):
        folder = run.folder / name
        if folder.exists() and not write_card(folder, reward_card(_facts(run, name, metrics))):
            logger.warning("output: %s: its README.md was edited, and stays as it is", folder)


def _facts(run: Run, name: str, metrics: Mapping[str, Any]) -> Facts:
    config = run.config
    saved = EnsembleRewardConfig.from_pretrained(run.folder / ("model" if name == "adapter" else name))
    return Facts(
        base=config.model if config.start is None or name == "stage1" else config.start,
        config=saved,
        scale=_scale(config, name),
        region=None if saved.trust_directions is None else _region(run),
        made=_made(run, name, metrics),
        numbers=_numbers(config, name, metrics),
        data=[config.data],
        adapter=name == "adapter",
    )


def _scale(config: TrainConfig, name: str) -> str:
    if name == "stage1":
        return LOGITS
    if config.start is not None:
        return KEPT
    return BEFORE_PET if config.stage == "pet" and name != "start" else CALIBRATED


def _region(run: Run) -> Region:
    """Of both sides of the pairs that `place_region` got."""
    pairs = run.train if run.mode == "head" else run.train[:CALIBRATION_PAIRS]
    return Region(2 * len(pairs), len({pair.prompt_key for pair in pairs}))


def _made(run: Run, name: str, metrics: Mapping[str, Any]) -> str:
    config = run.config
    command = "\n".join(f"    {line}" for line in command_of("train", config, _FLAGS).splitlines())
    held = f"{count(metrics['held_out_pairs'], 'pair')}"
    if metrics["held_out_pairs"]:
        held += f" of {count(metrics['held_out_prompts'], 'prompt')}"
    lines = [
        f"With prudent {__version__}:\n\n{command}\n",
        f"- **Mode** {run.mode}: {_MODES[run.mode]}.",
        f"- **Stages**: {_stages(config, name)}.",
        f"- **Data**: `{config.data}`, {count(metrics['train_pairs'], 'pair')} trained on, {held} held out "
        f"(fingerprint of the pairs `{run.counts['fingerprint']}`).",
    ]
    return "\n".join(lines)


def _stages(config: TrainConfig, name: str) -> str:
    if config.start is not None:
        done = [f"`{config.start}`, given"]
    else:
        first = "one head by Bradley-Terry" if config.stage1 is None else f"`{config.stage1}`, given as stage 1"
        done = [first]
        if config.supervised == "brme" and name != "stage1":
            done.append(f"{count(config.brme.num_heads, 'Gaussian head')} by BRME (arXiv 2409.15360, eq. 8)")
    if config.stage == "pet" and name in ("model", "adapter"):
        done.append(
            f"PET (arXiv 2505.20556), which lowers the reward of the best of {config.pet.samples} samples of "
            f"`{config.model}`"
        )
    return ", then ".join(done)


def _numbers(config: TrainConfig, name: str, metrics: Mapping[str, Any]) -> str:
    """What was measured of this model on the held-out pairs."""
    parts = []
    if "fit" in metrics and (name == "stage1" or config.supervised == "bt"):
        sentence = fit_sentence(metrics["fit"])
        parts.append(f"{sentence[0].upper()}{sentence[1:]}.")
    wanted = {"stage1": "stage 1", "start": "before PET"}.get(name, "")
    rows = [[row, *accuracy_cells(found)] for row, found in metrics["accuracy"].items() if wanted in row]
    if rows:
        pairs = f"{count(metrics['held_out_pairs'], 'pair')} of {count(metrics['held_out_prompts'], 'prompt')}"
        parts.append(
            f"Accuracy on the held-out {pairs}, with the 95 % interval from resampling prompts. "
            f"{few_prompts(metrics['held_out_prompts'])}".strip()
        )
        parts.append("\n".join(markdown_table([["reward", "accuracy, %", "95 % interval"], *rows])))
    if "pet" in metrics and name in ("model", "adapter"):
        parts.append("\n".join(f"    {line}" for line in pet_lines(metrics["pet"])))
    return "\n\n".join(parts) or "None: no pairs were held out (`eval_fraction`)."
