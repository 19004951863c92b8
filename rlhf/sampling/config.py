"""The config of a rollout: number, length and sampling of responses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..job.config import JobConfig


class RolloutConfig(JobConfig):
    """How responses are sampled."""

    prompts_per_step: int = Field(default=64, ge=1, description="Number of prompts in a step.")
    samples_per_prompt: int = Field(
        default=1, ge=1, description="Number of responses to each prompt; estimators rloo and group need at least 2."
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Largest number of tokens in a response.")
    min_new_tokens: int = Field(default=0, ge=0, description="Number of tokens before which a response cannot stop.")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Largest number of tokens in a prompt; null: as many as fit the model."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Temperature of sampling; 1: the policy's own distribution."
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="Number of most likely tokens to sample from; 0: all, as the update's probabilities assume.",
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Probability mass of the most likely tokens to sample from; 1: all."
    )
    engine: Literal["auto", "shared_prefix", "static", "continuous"] = Field(
        default="auto",
        description="Engine that samples the responses; auto: the fastest that suits device, model and keys.",
    )
    batch_rows: int = Field(default=256, ge=1, description="Number of responses sampled in one batch.")
