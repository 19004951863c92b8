"""A run held to its memory budget."""

from __future__ import annotations

from typing import Any

import torch

from ...engine.budget import parse_size
from .config import Kind, PPOConfig


def limit_memory(config: PPOConfig, device: torch.device) -> None:
    """Hold this process to `config.memory_budget` of a GPU, whatever the card has; ValueError for what is no size."""
    if config.memory_budget is not None and device.type == "cuda":
        # the index, not the device: "cuda" without one is refused here, and None is the current one
        torch.cuda.set_per_process_memory_fraction(_limit(config, device) / _card(device), device.index)


def with_micro_tokens(
    config: PPOConfig,
    model_config: Any,
    device: torch.device,
    longest: int | None = None,
    kind: Kind | None = None,
    heads: int = 5,
) -> PPOConfig:
    """`config` with update.micro_tokens auto resolved on a GPU; on a CPU it stays, and the update has its own default.

    longest: tokens of the longest prompt there is, which is what the plan is made for; None: what the config allows.
    kind: what the reward is, from `resolve_reward`; None: as the config says. heads: K of one on the policy's trunk.

    Raises:
        ValueError: if not even one sample fits the memory.
    """
    if config.update.micro_tokens != "auto" or device.type != "cuda":
        return config
    from ..plan import auto_micro_tokens  # which reads this package's config

    rollout = config.rollout.model_copy(update={} if longest is None else {"max_prompt_tokens": longest})
    reward = config.reward.model_copy(update={} if kind is None else {"kind": kind})
    planned = config.model_copy(update={"rollout": rollout, "reward": reward})
    tokens = auto_micro_tokens(planned, model_config, _limit(config, device), heads=heads)
    return config.model_copy(update={"update": config.update.model_copy(update={"micro_tokens": tokens})})


def _card(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def _limit(config: PPOConfig, device: torch.device) -> int:
    """Bytes that this process may take."""
    return _card(device) if config.memory_budget is None else min(parse_size(config.memory_budget), _card(device))
