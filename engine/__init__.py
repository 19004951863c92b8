"""Turn a trunk's hidden states into rewards: the head, the Hugging Face model, the scorer and calibration."""

from __future__ import annotations

from ..kernels import Aggregation
from .calibration import calibrate
from .config import EnsembleRewardConfig
from .head import EnsembleHead
from .model import EnsembleRewardModel, EnsembleRewardOutput
from .scorer import HeadScores, Scorer, Scores
from .trust import fit_trust

__all__ = [
    "Aggregation",
    "EnsembleHead",
    "EnsembleRewardConfig",
    "EnsembleRewardModel",
    "EnsembleRewardOutput",
    "HeadScores",
    "Scorer",
    "Scores",
    "calibrate",
    "fit_trust",
]
