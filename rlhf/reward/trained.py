"""Modes lora and full of `prudent train`: the trunk is trained with its heads in each stage."""

from __future__ import annotations

import shutil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine import EnsembleRewardModel, Scorer, calibrate
from ..data.pairs import PreferencePair, names_of_sides
from ..job.files import atomic_folder
from ..models.adapter import save_head
from ..models.loading import load_language_model, load_reward
from .config import FitConfig
from .losses import partition
from .pet.stage import PETStage, pessimistic_aggregation
from .region import place_region
from .run import Run, Scored, Truncation
from .start import load_frozen, load_stage1
from .trunk import train_trunk
from .two_stage import preference_probability, seeded

CALIBRATION_PAIRS = 2000  # give a head's mean and std to about 1.6 %; their features are computed for that alone


class WholeResult(NamedTuple):
    """scored: "single" (stage 1), "start" (before PET), "final", if the run has them. pet: PET's part of train.json."""

    scored: dict[str, Scored]
    pet: dict[str, Any] | None


def train_whole(run: Run) -> WholeResult:
    """Train each stage's trunk and heads, and save the models; models saved by an earlier start of the run are loaded.

    The paper can be read in two ways. By default both stages start from the base model ("we train a single-head RM and
    a 5-head BRME starting from" it): stage 1 remains a separate model, and stage 2 uses only its p_hat. With
    `trunk.stage2_from` stage1, stage 2 goes on from stage 1's trunk. In mode lora a stage that goes on from another
    trains the same LoRA on, so that adapter/ still belongs to the base model.
    """
    config, pet = run.config, None
    scored: dict[str, Scored] = {}
    if config.supervised is None:
        model = run.placed(load_frozen("pet.start", str(config.start), config))
    else:
        scored["single"], model = _supervised(run, "start" if config.stage == "pet" else "model")
    if config.stage == "pet":
        scored["start"] = _scored(run, "model", model)
        model, pet = _pessimistic(run, model)
    _save_adapter(run, model)
    return WholeResult({**scored, "final": _scored(run, "model", model)}, pet)


def _supervised(run: Run, name: str) -> tuple[Scored, EnsembleRewardModel]:
    """Train stages bt and brme; return stage 1's head, and the last stage's model, which is saved as `name`.

    Before stage pet, a model of stage bt is not saved again: it differs from stage1/ by its calibration.
    """
    config = run.config
    stage1 = _saved(run, "stage1")
    if stage1 is None:
        if config.stage1 is None:
            stage1 = _train_stage(run, seeded(config.bt, config.seed), (None, None))
        else:
            stage1 = run.placed(load_stage1(config))
        run.save("stage1", stage1, stage1.score)
    single = _scored(run, "stage1", stage1)
    model = _saved(run, name)
    if model is None:
        model = stage1
        if config.supervised == "brme":
            p_hat = preference_probability(stage1.score, *run.features("stage1", stage1, run.train))
            held_p = None if single.features is None else preference_probability(stage1.score, *single.features)
            del stage1, model  # one trunk in memory at a time
            model = _train_stage(run, seeded(config.brme, config.seed), (p_hat, held_p))
        model.score = model.score.frozen_copy()
        _place_region(run, model, calibrates=True)
        if name == "model" or config.supervised == "brme":
            run.save(name, model, model.score)
    return single, model


def _pessimistic(run: Run, start: EnsembleRewardModel) -> tuple[EnsembleRewardModel, dict[str, Any]]:
    """Stage pet: a policy on the base trunk is sampled, and the last stage's LoRA, if there is one, is trained on."""
    config = run.config
    policy = load_language_model("model", config.model, config.dtype).to(run.device).eval()
    lora = None if config.supervised is None else run.folder / "checkpoints" / config.supervised / "adapter"
    stage = PETStage(run, policy, pessimistic_aggregation(config, start.score))
    finished = _saved(run, "model")
    model, entry = stage.model(start, lora, finished)
    if finished is None:
        _place_region(run, model, calibrates=False)
        run.save("model", model, model.score)
    return model, entry


def _place_region(run: Run, model: EnsembleRewardModel, *, calibrates: bool) -> None:
    pairs = run.train[:CALIBRATION_PAIRS]
    features = run.features("model", model, pairs)
    if calibrates:
        calibrate(model.score, torch.cat(features))
    place_region(model.config, model.score, features, [pair.prompt_key for pair in pairs], run.config.aggregation)


def _scored(run: Run, name: str, model: EnsembleRewardModel) -> Scored:
    return Scored(model.score, run.features(name, model, run.held_out) if run.held_out else None)


def _saved(run: Run, name: str) -> EnsembleRewardModel | None:
    """Load the model that a finished stage has saved; None if there is none."""
    folder = run.folder / name
    return run.placed(load_reward("output", str(folder)).model) if folder.exists() else None


def _train_stage(run: Run, losses: FitConfig, p_hat: tuple[Tensor | None, Tensor | None]) -> EnsembleRewardModel:
    """p_hat: stage 1's probabilities of the training and of the held-out pairs, for stage brme."""
    goes_on = losses.stage == "brme" and run.config.trunk.stage2_from == "stage1"
    trunk, lora = (run.folder / "stage1", run.folder / "checkpoints" / "bt" / "adapter") if goes_on else (None, None)
    model = run.load(losses.num_heads, losses, name=trunk if run.mode == "full" else None)
    scorer = run.scorer("model", model)
    heads = partition(len(run.train), losses.num_heads, losses.seed).tolist()
    train, cut = _rows(run, scorer, run.train, heads, p_hat[0])
    held_out, held_cut = _rows(run, scorer, run.held_out, [0] * len(run.held_out), p_hat[1])
    run.note_truncation(cut, held_cut, scorer.max_length)
    return train_trunk(
        model,
        train,
        held_out,
        losses,
        run.config.trunk,
        "lora" if run.mode == "lora" else "full",
        run.folder / "checkpoints" / losses.stage,
        lora=lora if run.mode == "lora" else None,
        log=run.log,
        resume=run.resume,
        progress=run.progress,
    )


def _rows(
    run: Run, scorer: Scorer, pairs: list[PreferencePair], heads: list[int], p_hat: Tensor | None
) -> tuple[list[dict[str, Any]], Truncation]:
    """Tokenise pairs for `collate`; return the rows and the truncation of their texts."""
    margins = run.margins(pairs) if p_hat is None else None
    labels = {"p_hat": p_hat, "margin": margins}
    columns = {name: [None] * len(pairs) if t is None else t.tolist() for name, t in labels.items()}
    rows, texts, same = [], 0, 0
    names = names_of_sides(pairs)
    bar = tqdm(pairs, desc="tokenising", unit="pair", delay=1, disable=not run.progress)
    for i, (pair, head) in enumerate(zip(bar, heads, strict=True)):
        row: dict[str, Any] = {"head": head, **{name: column[i] for name, column in columns.items()}}
        for side, item, name in zip(("chosen", "rejected"), pair.items(), names[i :: len(pairs)], strict=True):
            row[side], cut, row[f"{side}_start"] = scorer.read(item, name)
            texts += cut
        same += row["chosen"] == row["rejected"]
        rows.append(row)
    return rows, Truncation(texts, 2 * len(pairs), same)


def _save_adapter(run: Run, model: EnsembleRewardModel) -> None:
    """Save the final stage's LoRA with its calibrated heads, for a policy on the same trunk.

    Not after stage pet on a given reward model, whose trunk need not be the policy's.
    """
    target, trained = run.folder / "adapter", run.folder / "checkpoints" / run.config.stage / "adapter"
    if target.exists() or not trained.exists() or run.config.start is not None:  # mode full has no LoRA
        return
    with atomic_folder(target) as folder:
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        reading = {name: getattr(model.config, name) for name in ("append_eos", "max_score_length", "taps")}
        save_head(model.score, folder, **reading)
        run.tokenizers["model"].save_pretrained(folder)
