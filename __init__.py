"""prudent: a pessimistic reward engine for RLHF. Names handed on, nothing defined.

The ops need torch alone; the engine and the doors, which need transformers, are imported when first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .kernels import (
    AdvantageOutput,
    Aggregation,
    EnsembleOutput,
    LogprobOutput,
    StepOutput,
    TrustRegion,
    advantage_convention,
    advantages,
    ensemble_reward,
    linear_logprob,
    preference_step,
)

if TYPE_CHECKING:
    from .engine import EnsembleHead, EnsembleRewardConfig, EnsembleRewardModel, Scorer, fit_trust
    from .rlhf.doors.client import RewardClient
    from .rlhf.doors.trl import trl_reward

__version__ = "0.1.0"
__all__ = [
    "AdvantageOutput",
    "Aggregation",
    "EnsembleHead",
    "EnsembleOutput",
    "EnsembleRewardConfig",
    "EnsembleRewardModel",
    "LogprobOutput",
    "RewardClient",
    "Scorer",
    "StepOutput",
    "TrustRegion",
    "advantage_convention",
    "advantages",
    "ensemble_reward",
    "fit_trust",
    "linear_logprob",
    "preference_step",
    "trl_reward",
]
_DOORS = {"RewardClient": ".rlhf.doors.client", "trl_reward": ".rlhf.doors.trl"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_DOORS.get(name, ".engine"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
