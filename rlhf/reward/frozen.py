"""Mode head of `prudent train`: the trunk is frozen, and every stage trains heads on its features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...engine import EnsembleHead, EnsembleRewardModel, calibrate
from ..evaluation.statistics import hidden_norms
from ..models.features import model_fingerprint
from ..models.loading import load_language_model
from .convex import RidgeFit
from .fit import PairFeatures
from .pet.stage import PETStage, pessimistic_aggregation
from .region import place_region, without_price
from .run import Run, Scored, Sides, Truncation, with_head
from .start import load_frozen, load_stage1
from .two_stage import fit_two_stages


class FrozenResult(NamedTuple):
    """scored: "single" (stage 1), "start" (before PET), "final", if the run has them. parts: further parts of
    train.json, "fit" (an exact stage 1) and "pet"."""

    scored: dict[str, Scored]
    parts: dict[str, Any]


class _Loaded(NamedTuple):
    """model: the trunk with fresh heads or those of a given reward model. policy: sampled by stage pet, or None."""

    model: EnsembleRewardModel
    policy: Any


def train_frozen(run: Run) -> FrozenResult:
    """Compute the features once, train every stage on them, and save the models."""
    config, scored, parts = run.config, {}, {}
    model, policy = _load(run)
    train, cut = run.read("model", model, run.train)
    held_out, held_cut = run.read("model", model, run.held_out) if run.held_out else (None, Truncation(0, 0, 0))
    run.note_truncation(cut, held_cut, run.scorer("model", model).max_length)
    run.log.metrics(0, hidden_norms(*train), prefix="features/train")
    if held_out is not None:
        run.log.metrics(0, hidden_norms(*held_out), prefix="features/eval")
    final, prompts = model.score, [pair.prompt_key for pair in run.train]
    if config.supervised is not None:

        def note(fit: RidgeFit) -> None:
            parts["fit"] = fit.summary()

        heads = fit_two_stages(
            PairFeatures(*train, None, run.margins(run.train), run.prompts(run.train)),
            config.bt,
            config.brme if config.supervised == "brme" else None,
            seed=config.seed,
            stage1=None if config.stage1 is None else model.score,
            evaluation=None if held_out is None else PairFeatures(*held_out, None, run.margins(run.held_out)),
            aggregation=without_price(config.aggregation),
            on_fit=note,
            on_stage1=lambda head: _save_stage1(run, model, head, train, parts.get("fit")),
            checkpoints=run.folder / "checkpoints",
            log=run.log,
            progress=run.progress,
        )
        scored["single"] = Scored(heads.single, held_out)
        final = heads.final.frozen_copy()  # stage 1 stays uncalibrated: its differences are Bradley-Terry logits
        calibrate(final, torch.cat(train))
    place_region(model.config, final, train, prompts, config.aggregation)
    if config.stage == "pet":
        if config.supervised == "brme":
            run.save("start", model, final)
        scored["start"] = Scored(final, held_out)
        stage = PETStage(run, policy, pessimistic_aggregation(config, final))
        final, parts["pet"] = stage.heads(run.scorer("model", model), final, train, held_out)
        place_region(model.config, final, train, prompts, config.aggregation)  # its unit is that of the new heads
    run.save("model", model, final, parts.get("fit") if config.stage == "bt" else None)
    return FrozenResult({**scored, "final": Scored(final, held_out)}, parts)


def _save_stage1(
    run: Run, model: EnsembleRewardModel, head: EnsembleHead, train: Sides, fit: dict[str, Any] | None
) -> None:
    saved = head.frozen_copy()
    place_region(model.config, saved, train, [pair.prompt_key for pair in run.train])
    run.save("stage1", model, saved, fit)


def _load(run: Run) -> _Loaded:
    """Load the run's models; if policy and reward have the same trunk, it is in memory once."""
    config = run.config
    if config.stage != "pet":
        return _Loaded(run.load(1) if config.stage1 is None else run.placed(load_stage1(config)), None)
    start = None if config.start is None else run.placed(load_frozen("pet.start", config.start, config))
    policy = load_language_model("model", config.model, config.dtype).to(run.device).eval()
    if start is None:
        return _Loaded(run.load(1, trunk=policy), policy)
    reading: dict[str, Any] = {"taps": start.config.taps, "logprob_skips": start.config.logprob_skips}
    if model_fingerprint(EnsembleRewardModel.from_trunk(policy, **reading)) == model_fingerprint(start):
        start = with_head(start, start.score, policy)
    return _Loaded(start, policy)
