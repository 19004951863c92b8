"""BRME's two stages on cached features: a Bradley-Terry head, then an ensemble trained on its probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...engine.head import EnsembleHead
from ...kernels import Aggregation
from ..job.log import RunLog
from .config import BradleyTerryConfig, BRMEConfig, refuse_unread_by_solver
from .convex import RidgeFit, fit_ridge
from .fit import PairFeatures, fit_heads, pair_metrics
from .pet.config import PETConfig

_MARGIN = 1e-7  # smallest distance of p_hat from 0 and 1

Seeded = TypeVar("Seeded", BradleyTerryConfig, BRMEConfig, PETConfig)


class TwoStages(NamedTuple):
    """The heads of both stages, on raw features, not calibrated.

    single: stage 1's one head, whose reward differences are Bradley-Terry logits. final: stage 2's K heads, or `single`
    if stage 2 was left out.
    """

    single: EnsembleHead
    final: EnsembleHead


def fit_two_stages(
    pairs: PairFeatures,
    bt: BradleyTerryConfig,
    brme: BRMEConfig | None,
    *,
    seed: int = 0,
    stage1: EnsembleHead | None = None,
    evaluation: PairFeatures | None = None,
    aggregation: str | Aggregation | None = None,
    on_fit: Callable[[RidgeFit], None] | None = None,
    on_stage1: Callable[[EnsembleHead], None] | None = None,
    checkpoints: Path | None = None,
    log: RunLog | None = None,
    progress: bool = True,
) -> TwoStages:
    """Train one head by Bradley-Terry (BRME eq. 3), then K heads by eq. 8 on its probabilities.

    Args:
        pairs: training pairs; stage 1 uses `margin`, with solver newton also `prompts`; `p_hat` is ignored, because
            stage 1 computes it.
        brme: None stops after stage 1.
        seed: added to the seed of each config.
        stage1: a trained head to use instead of training stage 1.
        evaluation: held-out pairs, evaluated after every epoch of each stage, and after an exact fit.
        aggregation: the ensemble's; None: `fit_heads`'s default.
        on_fit: called with stage 1's exact fit (solver newton), before `on_stage1`.
        on_stage1: called with stage 1's head before stage 2 begins.
        checkpoints: folder of bt.pt and brme.pt, from which a killed training resumes.

    Raises:
        ValueError: as `fit_heads` and `fit_ridge`; for solver newton without prompts; for a key that the solver does
            not read.
    """
    options: dict[str, Any] = {"log": log, "progress": progress}

    def checkpoint(stage: str) -> Path | None:
        return None if checkpoints is None else checkpoints / f"{stage}.pt"

    single = stage1
    if single is None:
        refuse_unread_by_solver(bt)
    if single is None and bt.solver == "newton":
        fit = _exact(pairs, seeded(bt, seed), evaluation, log)
        single = fit.head
        if on_fit is not None:
            on_fit(fit)
    elif single is None:
        single = fit_heads(
            pairs.chosen,
            pairs.rejected,
            seeded(bt, seed),
            margin=pairs.margin,
            evaluation=evaluation,
            checkpoint=checkpoint("bt"),
            **options,
        ).head
    if on_stage1 is not None:
        on_stage1(single)
    if brme is None:
        return TwoStages(single, single)
    if evaluation is not None:
        sides = evaluation.chosen, evaluation.rejected
        evaluation = PairFeatures(*sides, preference_probability(single, *sides))
    final = fit_heads(
        pairs.chosen,
        pairs.rejected,
        seeded(brme, seed),
        p_hat=preference_probability(single, pairs.chosen, pairs.rejected),
        evaluation=evaluation,
        aggregation=aggregation,
        checkpoint=checkpoint("brme"),
        **options,
    ).head
    return TwoStages(single, final)


def _exact(
    pairs: PairFeatures, config: BradleyTerryConfig, evaluation: PairFeatures | None, log: RunLog | None
) -> RidgeFit:
    """Solve stage 1; log the curve, a row for each penalty, and a row of the result as `fit_heads` logs an epoch."""
    if pairs.prompts is None:
        raise ValueError(
            "prompts: expected labels of the pairs for bt.solver newton, which holds out prompts, got none"
        )
    fit = fit_ridge(
        pairs.chosen,
        pairs.rejected,
        pairs.prompts,
        margin=pairs.margin,
        grid=config.l2,
        folds=config.folds,
        seed=config.seed,
        std_floor=config.std_floor,
    )
    if log is None:
        return fit
    for step, point in enumerate(fit.curve):
        log.metrics(step, {f"fit_{name}": value for name, value in point._asdict().items()}, prefix=config.stage)
    row = {"l2": fit.l2, "loss": fit.log_loss}
    if evaluation is not None and len(evaluation.chosen):
        with torch.no_grad():
            out = fit.head(torch.cat([evaluation.chosen, evaluation.rejected]))
        measured = pair_metrics(out, config, margin=evaluation.margin)
        row |= {f"eval_{name}": value for name, value in measured.items() if name != "std"}
    log.metrics(fit.iterations, row, prefix=config.stage)
    return fit


@torch.no_grad()
def preference_probability(head: EnsembleHead, chosen: Tensor, rejected: Tensor) -> Tensor:
    """p_hat [P] fp64: sigma(r_chosen - r_rejected) of the stage-1 head (BRME eq. 2), from features [P, D] of each side.

    The paper does not clamp p_hat. We keep it at least 1e-7 from 0 and 1, because a sigmoid saturates and `fit_heads`
    refuses a probability that is not between them. 1e-7 is about the smallest distance from 1 in float32, in which
    eq. 8 is computed; it moves a target of eq. 8 by alpha * 1e-7 at most.
    """
    difference = head(chosen, aggregation="mean").reward.double() - head(rejected, aggregation="mean").reward.double()
    return torch.sigmoid(difference).clamp(_MARGIN, 1 - _MARGIN)


def seeded(config: Seeded, seed: int) -> Seeded:
    """A stage's config with the run's seed added to its own."""
    return config.model_copy(update={"seed": seed + config.seed})
