"""Ops: tensors in, tensors out. Nothing here knows of models, text or training."""

from .ensemble_reward import (
    STD_FLOOR,
    Aggregation,
    EnsembleOutput,
    aggregate,
    ensemble_reward,
    nominal_reward,
    philox_normal,
)

__all__ = [
    "STD_FLOOR",
    "Aggregation",
    "EnsembleOutput",
    "aggregate",
    "ensemble_reward",
    "nominal_reward",
    "philox_normal",
]
