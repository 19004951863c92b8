"""PET on cached features: the loop of `fit.py`, with the samples re-ranked at every step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..engine.head import EnsembleHead
from ..kernels import Aggregation
from .pet import PETConfig
from .runlog import RunLog


class PETFeatures(NamedTuple):
    """Features of P pairs and of n reference samples for each of X prompts.

    chosen, rejected  [P, D]
    prompt            [P] int64, each pair's row in `samples`; -1: its prompt has none, and only Bradley-Terry reads it
    samples           [X, n, D]
    reference         [X, D], one more sample of each prompt; for `reference: sample`
    margin            [P], of the Bradley-Terry loss
    """

    chosen: Tensor
    rejected: Tensor
    prompt: Tensor
    samples: Tensor
    reference: Tensor | None = None
    margin: Tensor | None = None


class PETFit(NamedTuple):
    """head: acts on raw features, with the start's calibration. history: one dict of numbers an epoch.
    before, after: loss, gap, bt, accuracy on the whole training data, and eval_* on the held-out data where given."""

    head: EnsembleHead
    history: list[dict[str, float]]
    before: dict[str, float]
    after: dict[str, float]


def fit_pet(
    head: EnsembleHead,
    data: PETFeatures,
    config: PETConfig,
    *,
    aggregation: str | Aggregation | None = None,
    evaluation: PETFeatures | None = None,
    log: RunLog | None = None,
    progress: bool = True,
    checkpoint: Path | str | None = None,
) -> PETFit:
    """Minimise PET's objective over a trained head. Same inputs and config, same bits."""
    raise ValueError("fit_pet: not written yet")
