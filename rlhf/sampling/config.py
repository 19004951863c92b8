"""The configs of a rollout (number, length and sampling of responses) and of `prudent sample`."""

from __future__ import annotations

from pathlib import Path
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


class SampleConfig(JobConfig):
    """The config of `prudent sample`."""

    model: str = Field(description="Causal language model to sample from: folder or hub name.")
    prompts: str = Field(
        description="Prompts: a .txt file with one a line, JSON lines, Parquet, or a data set name (NAME:SPLIT)."
    )
    output: Path = Field(description="JSON lines to write: prompt, response, and whether it ended by itself (stopped).")
    rollout: RolloutConfig = Field(
        default=RolloutConfig(), description="How responses are sampled; a step's are written at once."
    )
    limit: int | None = Field(default=None, ge=1, description="Number of prompts to sample, the first; null: all.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number type of the model; auto: the one of its weights."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the responses.")
    skip_bad_rows: bool = Field(
        default=False, description="Count broken rows of prompts and continue instead of stopping at the first."
    )
