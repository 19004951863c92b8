"""The config of `prudent plan`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from ..ppo.budget import parse_size
from ..ppo.config import PPOConfig, RewardConfig
from ..reward.config import Features


class PlanConfig(PPOConfig):
    """A `PPOConfig` (one file serves both) in which prompts, output and the reward's source may be missing."""

    model: str = Field(description="Built-in shape, config.json, local folder or hub name of the policy.")
    prompts: str = Field(default="", description="Prompts of `prudent ppo`, which the plan does not read.")
    output: Path = Field(default=Path(), description="Run folder of `prudent ppo`, which the plan does not write.")
    reward: RewardConfig = Field(
        default=RewardConfig(source="heads on the policy's trunk", kind="shared"),
        description="Where rewards come from.",
    )
    gpu: str = Field(
        default="80GB",
        description="Memory of the card, e.g. 80GB (10^9 bytes) or 80GiB (2^30), unless memory_budget is less.",
    )
    heads: int = Field(default=5, ge=1, description="Heads of a reward on the policy's trunk, K.")
    features: Features = Field(
        default="last", description="What these heads read: last, wide, or a list such as [last:-1, mean:2/3]."
    )
    verify: bool = Field(
        default=False, description="Run the loop on tensors without data and compare its memory with the plan."
    )

    @field_validator("gpu")
    @classmethod
    def _card(cls, value: str) -> str:
        parse_size(value)
        return value
