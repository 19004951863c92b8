"""The job behind `prudent study learning`: what PPO makes of each reward on a real, small language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from ..config import JobConfig


class LearningConfig(JobConfig):
    """Everything `prudent study learning` can be told."""

    model: str
    output: Path = Path("runs/study/learning")
    seeds: int = Field(3, ge=1)


def run_learning(config: LearningConfig, *, progress: bool = True) -> Any:
    """Every run that is not done yet, then learning.json, learning.md and learning.png."""
    raise ValueError("study learning: not finished")
