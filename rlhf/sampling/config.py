"""The config of a rollout: how many responses, how long, sampled how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..job.config import JobConfig


class RolloutConfig(JobConfig):
    """How responses are drawn."""

    prompts_per_step: int = Field(default=64, ge=1)
    samples_per_prompt: int = Field(default=1, ge=1)  # rloo and group need two at least
    max_new_tokens: int = Field(default=64, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    max_prompt_tokens: int | None = Field(default=None, ge=1)  # longer prompts are refused; None: what the model holds
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)  # 0: all; the update's probabilities are those of the whole vocabulary
    top_p: float = Field(default=1.0, gt=0, le=1)
    engine: Literal["auto", "shared_prefix", "static", "continuous"] = "auto"
    batch_rows: int = Field(default=256, ge=1)
