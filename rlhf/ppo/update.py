"""PPO's update: epochs of minibatches over one step's experience, each an exact gradient from small forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...kernels.linear_logprob.contract import LogprobOutput
from .batch import Experience, TokenBatch, micro_batches, token_batch
from .config import PPOConfig
from .losses import chi2_estimate, chi2_price, kl_estimate, policy_loss, sequence_sum, value_loss

AUTO_MICRO_TOKENS = 8192  # where update.micro_tokens is still auto: nobody has planned the memory


class Trainable(Protocol):
    """What the update needs of a `Policy`."""

    def hidden(self, batch: TokenBatch, role: Any) -> Tensor: ...
    def logprobs(self, hidden: Tensor, batch: TokenBatch, temperature: float) -> LogprobOutput: ...
    def values(self, hidden_rows: Tensor) -> Tensor: ...
    def parameter_groups(self, config: PPOConfig) -> list[dict[str, Any]]: ...
    def train(self, mode: bool = True) -> Any: ...
    @property
    def training(self) -> bool: ...


def open_optimizer(policy: Trainable, config: PPOConfig) -> torch.optim.Optimizer:
    """AdamW over `policy.parameter_groups`, or bitsandbytes' 8-bit AdamW, paged or not.

    Raises:
        ImportError: naming the extra, where bitsandbytes is asked for and missing.
    """
    raise NotImplementedError


def set_learning_rates(optimizer: torch.optim.Optimizer, config: PPOConfig, step: int) -> None:
    """Each group's rate in step `step` (from 0) of the loop: its own times min(1, (step + 1) / update.warmup)."""
    raise NotImplementedError


def update(
    policy: Trainable,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: PPOConfig,
    *,
    kl_coef: float,
    generator: torch.Generator,
    progress: bool = False,
) -> dict[str, float]:
    raise NotImplementedError
