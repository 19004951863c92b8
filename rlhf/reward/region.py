"""Give a trained reward the trust region of its training responses, and the price of distance that the config asks."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...engine import EnsembleHead, EnsembleRewardConfig, fit_trust
from ...engine.trust import LEAST_ROWS, blocks_of_taps
from ...kernels import Aggregation
from ..evaluation.statistics import group_labels

logger = logging.getLogger(__name__)


def place_region(
    config: EnsembleRewardConfig,
    head: EnsembleHead,
    sides: Sequence[Tensor],
    prompts: Sequence[Hashable],
    aggregation: str | None = None,
) -> None:
    """Set the head's trust region to that of both sides of the training pairs; then its aggregation.

    Args:
        config: of the head's model, which says what the features are.
        head: calibrated, because the region's unit is in the units of its reward.
        sides: features [P, D] of chosen and of rejected.
        prompts: P keys, equal for equal prompts.
        aggregation: the config's; None keeps the head's.

    Raises:
        ValueError: for an aggregation with a price of distance if there are too few responses for a region.
    """
    features = torch.cat([*sides])
    spec = None if aggregation is None else of_heads(aggregation, head.num_heads)
    if len(features) < LEAST_ROWS:
        few = f"expected at least {LEAST_ROWS} training responses for a trust region, got {len(features)}"
        if spec is not None and spec.trust is not None:
            raise ValueError(f"aggregation: {few}, so that {str(spec)!r} has no distance to price")
        logger.warning("data: %s: the model measures no distance", few)
    else:
        labels = group_labels(prompts).repeat(len(sides))
        head.set_trust(fit_trust(features, prompts=labels, head=head, blocks=distance_blocks(config)))
    if spec is not None:
        head.aggregation = spec


def distance_blocks(config: EnsembleRewardConfig) -> Tensor | None:
    """[F] int64, the blocks of features that the distance of such a model reads; None: all, as one."""
    return blocks_of_taps(config.taps, config.feature_size)


def of_heads(aggregation: str | Aggregation, num_heads: int) -> Aggregation:
    """The config's aggregation for a model of `num_heads` heads: one head keeps only the price of distance."""
    spec = Aggregation.parse(aggregation)
    if num_heads > 1:
        return spec
    return Aggregation("mean", trust=spec.trust, trust_from=spec.trust_from, trust_power=spec.trust_power)


def without_price(aggregation: str | Aggregation) -> str:
    """The aggregation without its price of distance, for heads that have no trust region yet."""
    return str(replace(Aggregation.parse(aggregation), trust=None, trust_from=0.0, trust_power=2))
