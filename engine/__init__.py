"""Features to reward: the head, the Hugging Face model, the scorer, calibration. Names handed on, nothing defined."""

from __future__ import annotations

from .head import Aggregation, EnsembleHead

__all__ = ["Aggregation", "EnsembleHead"]
