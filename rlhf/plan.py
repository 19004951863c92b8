"""`prudent plan`: what a PPO run takes on a card, phase by phase, from configs alone."""

from __future__ import annotations

from typing import Any

from .ppo.config import PPOConfig


def auto_micro_tokens(config: PPOConfig, model_config: Any, limit: int) -> int:
    """`update.micro_tokens: auto` resolved: what fits into `limit` bytes.

    Raises:
        ValueError: if not even one sample does, with the term to cut and the key that cuts it.
    """
    raise NotImplementedError
