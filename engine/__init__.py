"""Features to reward: the head, the Hugging Face model, the scorer, calibration. Names handed on, nothing defined."""

from __future__ import annotations

from ..kernels import Aggregation
from .calibration import calibrate
from .config import EnsembleRewardConfig
from .head import EnsembleHead
from .model import EnsembleRewardModel, EnsembleRewardOutput
from .scorer import Scorer, Scores

__all__ = [
    "Aggregation",
    "EnsembleHead",
    "EnsembleRewardConfig",
    "EnsembleRewardModel",
    "EnsembleRewardOutput",
    "Scorer",
    "Scores",
    "calibrate",
]
