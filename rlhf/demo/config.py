"""The config of `prudent demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..job.config import JobConfig
from ..reward.config import BRMEConfig, Features

# what `size` sets; a key that is given itself stays as given
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "samples_per_prompt": 4,
        "held_out_prompts": 24,
        "best_of": 64,
        "max_new_tokens": 16,
        "ppo": {"steps": 4, "max_new_tokens": 16},
    },
    "full": {
        "samples_per_prompt": 16,
        "held_out_prompts": 32,
        "best_of": 256,
        "max_new_tokens": 28,
        "ppo": {"steps": 12, "max_new_tokens": 20},
    },
}


class DemoPPOConfig(JobConfig):
    """The two PPO runs."""

    steps: int = Field(default=4, ge=0, description="Steps of each PPO run; 0: no PPO.")
    prompts_per_step: int = Field(default=6, ge=1, description="Number of held-out prompts in a step.")
    samples_per_prompt: int = Field(
        default=4, ge=2, description="Number of responses to each prompt, each compared with the others' mean (RLOO)."
    )
    max_new_tokens: int = Field(default=16, ge=1, description="Largest number of tokens in a response.")
    lr: float = Field(default=2e-3, gt=0, description="Learning rate, high because the steps are few.")
    kl_coef: float = Field(
        default=0.0, ge=0, description="Weight of the KL divergence from the reference; 0: only the reward counts."
    )
    lora_rank: int = Field(default=16, ge=1, description="Rank of the policy's LoRA adapter.")
    judged: int = Field(
        default=4,
        ge=1,
        description="Number of responses of each trained policy to each held-out prompt, judged at the end.",
    )


class DemoConfig(JobConfig):
    """The config of `prudent demo`.

    Size small samples about 45,000 tokens, size full about 270,000.
    """

    output: Path = Field(default=Path("runs/demo"), description="Run folder.")
    size: Literal["small", "full"] = Field(
        default="small",
        description="Sets the numbers of prompts, responses, tokens and PPO steps that are not given themselves.",
    )
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
    features: Features | None = Field(
        default=None,
        description="Hidden states that heads and distance read: last, wide, or a list such as [last:-1, mean:2/3]; "
        "null: the mean over the response at two thirds of the layers.",
    )
    seed: int = Field(default=0, ge=0, lt=2**30, description="Seed of the run.")
    samples_per_prompt: int = Field(default=4, ge=2, description="Number of responses to each training prompt.")
    pairs: int = Field(default=300, ge=20, description="Number of preference pairs that a reward is trained on.")
    draws: int = Field(
        default=10, ge=1, description="Number of draws of pairs and flipped labels, each with rewards of its own."
    )
    label_noise: float = Field(default=0.25, ge=0, le=0.5, description="Share of the labels that are flipped.")
    held_out_prompts: int = Field(default=24, ge=2, description="Number of prompts held out for evaluation.")
    best_of: int = Field(default=64, ge=4, description="Number of candidates for each held-out prompt, n of best-of-n.")
    foreign: float = Field(
        default=0.1,
        gt=0,
        le=0.5,
        description="Share of foreign candidates (repeated snippets, shuffled words) in the mixture.",
    )
    price: float = Field(default=1.0, gt=0, description="Price of the distance, the number of trust:NUMBER.")
    max_new_tokens: int = Field(default=16, ge=1, description="Largest number of tokens in a response.")
    temperature: float = Field(default=0.8, gt=0, description="Temperature of sampling.")
    top_k: int = Field(default=50, ge=1, description="Number of most likely tokens to sample from.")
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="Probability mass of the most likely tokens to sample from."
    )
    batch_rows: int = Field(default=256, ge=1, description="Number of responses sampled in one batch.")
    brme: BRMEConfig = Field(default=BRMEConfig(), description="The ensemble of Gaussian heads.")
    ppo: DemoPPOConfig = Field(default=DemoPPOConfig(), description="The two PPO runs.")

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        size = SIZES.get(values.get("size", "small")) if isinstance(values, dict) else None
        if size is None:  # refused below
            return values
        filled = {**size, **values}
        if isinstance(filled["ppo"], dict):
            filled["ppo"] = {**size["ppo"], **filled["ppo"]}
        return filled
