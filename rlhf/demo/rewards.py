"""The demo's rewards: a single head with a trust region, and BRME's ensemble, on the same hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine import EnsembleHead, EnsembleRewardModel, calibrate
from ...engine.likelihood import special_ids
from ...engine.taps import num_layers, parse_taps, wide_taps
from ...engine.trust import blocks_of_taps, fit_trust
from ...kernels import TrustRegion
from ..job.files import atomic_folder, atomic_write_json
from ..job.log import RunLog
from ..report.fit import FIT_FILE
from ..reward.config import BradleyTerryConfig, BRMEConfig
from ..reward.convex import RidgeFit
from ..reward.fit import PairFeatures
from ..reward.two_stage import fit_two_stages

SINGLE, ENSEMBLE, TRUST = "single head", "tradeoff:0.4", "trust"
TITLES = {
    SINGLE: "tuned single head",
    ENSEMBLE: "tradeoff λ=0.4 (BRME)",
    TRUST: "trust region",
    "oracle": "the judge itself",
}


def taps_of(model: Any, features: str | list[str] | None) -> list[str]:
    """The hidden states that heads and distance read; None: the mean over the response at two thirds of the layers.

    There a distance sees foreign text best, and heads find more than in the last state
    (bench/results/overoptimisation-smollm2.md).
    """
    layers = num_layers(model)
    if features is None:
        return [str(tap) for tap in wide_taps(layers) if tap.kind == "mean"]
    return [str(tap) for tap in parse_taps(features, layers)]


class Fitted(NamedTuple):
    """Heads on features [N, D], calibrated on the reference responses, each with their trust region.

    single: one head.   ensemble: K Gaussian heads.   choice: how the single head's penalty was chosen, as JSON.
    """

    single: EnsembleHead
    ensemble: EnsembleHead
    choice: dict[str, Any]


class Reference(NamedTuple):
    """Features [N, D] fp32 of the reference responses, their prompts' labels [N] int64, and the region they lie in."""

    features: Tensor
    prompts: Tensor
    region: TrustRegion

    @classmethod
    def fit(cls, features: Tensor, prompts: Tensor, taps: Sequence[str]) -> Reference:
        """Fit the region once; its unit is each head's own."""
        features = features.float()
        blocks = blocks_of_taps(taps, features.shape[1])
        return cls(features, prompts, fit_trust(features, prompts=prompts, blocks=blocks))


def fit_rewards(
    chosen: Tensor,
    rejected: Tensor,
    prompts: Sequence[int],
    reference: Reference,
    brme: BRMEConfig,
    *,
    seed: int,
    held_out: tuple[Tensor, Tensor] | None = None,
    checkpoints: Path | None = None,
    log: RunLog | None = None,
    progress: bool = True,
) -> Fitted:
    """Train both rewards on pairs; the ensemble learns from the single head's probabilities.

    Args:
        chosen, rejected: [P, D], any floating dtype.   prompts: [P] labels of the pairs' prompts.
        held_out: features of held-out pairs, evaluated after every epoch of the ensemble.
        checkpoints, log: of the ensemble's training.

    Raises:
        ValueError: as `fit_two_stages`, `calibrate` and `fit_trust`.
    """
    sides = chosen.float(), rejected.float()
    choices: list[RidgeFit] = []
    stages = fit_two_stages(
        PairFeatures(*sides, prompts=torch.tensor(prompts)),
        BradleyTerryConfig(),
        brme,
        seed=seed,
        evaluation=None if held_out is None else PairFeatures(held_out[0].float(), held_out[1].float()),
        on_fit=choices.append,
        checkpoints=checkpoints,
        log=log,
        progress=progress,
    )
    heads = []
    for fitted in (stages.single, stages.final):
        head = fitted.frozen_copy().eval()
        calibrate(head, reference.features)
        with torch.no_grad():
            reward = head(reference.features, aggregation="mean").mean.mean(dim=1)
        unit = _spread_within(reward.double(), reference.prompts)
        head.set_trust(reference.region._replace(unit=unit.reshape(1)))
        heads.append(head)
    return Fitted(heads[0], heads[1], choices[0].summary())


def save_rewards(fitted: Fitted, folder: Path, model: Any, tokenizer: Any, taps: Sequence[str], price: float) -> None:
    """Save model/, the single head with the price on its distance, and ensemble/, unless they exist.

    model: the trunk of both, with these taps.
    """
    for name, head, spec in (("model", fitted.single, f"trust:{price:g}"), ("ensemble", fitted.ensemble, ENSEMBLE)):
        if (folder / name).exists():
            continue
        with atomic_folder(folder / name) as new:
            options: dict[str, Any] = {"aggregation": spec, "taps": taps, "logprob_skips": special_ids(tokenizer)}
            saved = EnsembleRewardModel.from_trunk(model, head=head.frozen_copy(), **options)
            saved.save_pretrained(new)
            tokenizer.save_pretrained(new)
            if name == "model":
                atomic_write_json(new / FIT_FILE, fitted.choice)


def _spread_within(values: Tensor, prompts: Tensor) -> Tensor:
    """[]: the standard deviation of values [N] within a prompt; of all if no prompt has two."""
    labels = prompts.unique(return_inverse=True)[1]
    counts = labels.bincount()
    if len(values) == len(counts):
        return values.std()
    mean = torch.zeros(len(counts), dtype=values.dtype).index_add_(0, labels, values) / counts
    spread: Tensor = ((values - mean[labels]).square().sum() / (len(values) - len(counts))).sqrt()
    return spread


@torch.no_grad()
def rewards_of(fitted: Fitted, features: Tensor, price: float) -> dict[str, Tensor]:
    """[N, D] of any floating dtype -> the names of `TITLES` but the oracle's -> rewards [N]."""
    features = features.float()
    return {
        SINGLE: fitted.single(features, aggregation="mean").reward,
        ENSEMBLE: fitted.ensemble(features, aggregation=ENSEMBLE).reward,
        TRUST: fitted.single(features, aggregation=f"trust:{price:g}").reward,
    }


@torch.no_grad()
def distance(fitted: Fitted, features: Tensor) -> Tensor:
    """[N, D] of any floating dtype -> [N]; 1 is the edge of 95 % of the reference responses."""
    found: Tensor | None = fitted.single(features.float(), aggregation="mean").distance
    assert found is not None
    return found
