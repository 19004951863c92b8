"""The job behind `prudent study stochastic`: lemma 1's stochastic case (BRME, arXiv 2409.15360, 6.2 and appendix E)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from ..config import JobConfig


class StochasticConfig(JobConfig):
    """Everything `prudent study stochastic` can be told."""

    output: Path = Path("runs/study/stochastic")
    seeds: int = Field(40, ge=2)


def run_stochastic(config: StochasticConfig, *, progress: bool = True) -> Any:
    """Train good policies on rewards that mean nothing; write stochastic.json, stochastic.md and stochastic.png."""
    raise ValueError("study stochastic: not finished")
