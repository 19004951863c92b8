"""The config of `prudent demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ..job.config import JobConfig
from ..reward.config import BradleyTerryConfig, BRMEConfig, Features, refuse_unread_by_solver


class DemoPPOConfig(JobConfig):
    """The two PPO runs. A step takes about 6 s on two idle AVX512-BF16 cores, so the defaults take 2.5 minutes."""

    steps: int = Field(default=12, ge=0, description="Steps of each PPO run; 0: no PPO.")
    prompts_per_step: int = Field(default=6, ge=1, description="Number of held-out prompts in a step.")
    samples_per_prompt: int = Field(
        default=4, ge=2, description="Number of responses to each prompt, each compared with the others' mean (RLOO)."
    )
    max_new_tokens: int = Field(default=20, ge=1, description="Largest number of tokens in a response.")
    lr: float = Field(default=2e-3, gt=0, description="Learning rate, high because the steps are few.")
    kl_coef: float = Field(
        default=0.0, ge=0, description="Weight of the KL divergence from the reference; 0: only the reward counts."
    )
    lora_rank: int = Field(default=16, ge=1, description="Rank of the policy's LoRA adapter.")


class DemoConfig(JobConfig):
    """The config of `prudent demo`. The defaults sample about 270,000 tokens: about 4 minutes on two idle AVX512-BF16
    cores (1,400 tokens/s), 13 on cores that multiply in float32. The heads take half a minute; for PPO see
    `DemoPPOConfig`."""

    output: Path = Field(default=Path("runs/demo"), description="Run folder.")
    model: str | None = Field(
        default=None,
        description="Causal language model, folder or hub name; null: SmolLM2-135M-Instruct from its wheel.",
    )
    prompts: Path | None = Field(
        default=None, description="File with one prompt per line; null: a few hundred built-in prompts."
    )
    preferences: str | None = Field(
        default=None,
        description="Real preference pairs (file or data set name); null: sampled pairs, with a gold scorer.",
    )
    limit: int | None = Field(default=None, ge=1, description="Rows of preferences to read; null: all.")
    skip_bad_rows: bool = Field(
        default=False, description="Count broken rows of preferences and continue instead of stopping at the first."
    )
    eval_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share of the prompts of preferences that is held out."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Number type of the model; auto: bfloat16 if the machine multiplies it in hardware."
    )
    features: Features = Field(
        default="last",
        description="Hidden states that heads read: last (the last token's), wide (a mean over the response too), or a "
        "list such as [last:-1, mean:20].",
    )
    seed: int = Field(default=0, ge=0, lt=2**30, description="Seed of the run.")
    samples_per_prompt: int = Field(default=16, ge=2, description="Number of responses to each training prompt.")
    pairs_per_prompt: int = Field(
        default=120, ge=1, description="Number of pairs of each training prompt; 120: all pairs of 16 responses."
    )
    held_out_prompts: int = Field(default=32, ge=2, description="Number of prompts held out for evaluation.")
    best_of: int = Field(default=256, ge=4, description="Number of responses to each held-out prompt, n of best-of-n.")
    label_noise: float = Field(default=0.25, ge=0, le=0.5, description="Share of the labels that are flipped.")
    max_new_tokens: int = Field(default=28, ge=1, description="Largest number of tokens in a response.")
    temperature: float = Field(default=0.8, gt=0, description="Temperature of sampling.")
    top_k: int = Field(default=50, ge=1, description="Number of most likely tokens to sample from.")
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="Probability mass of the most likely tokens to sample from."
    )
    batch_rows: int = Field(default=256, ge=1, description="Number of responses sampled in one batch.")
    bt: BradleyTerryConfig = Field(default=BradleyTerryConfig(), description="The single Bradley-Terry head.")
    brme: BRMEConfig = Field(default=BRMEConfig(), description="The ensemble of Gaussian heads.")
    ppo: DemoPPOConfig = Field(default=DemoPPOConfig(), description="The two PPO runs.")

    @model_validator(mode="after")
    def _keys_that_the_solver_reads(self) -> DemoConfig:
        refuse_unread_by_solver(self.bt)
        return self
