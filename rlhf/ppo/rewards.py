"""Where rewards come from: heads on the policy's own trunk, another model, a function or a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ...engine import EnsembleHead
from .batch import Samples
from .config import PPOConfig, RewardConfig
from .prompts import Prompt

Kind = Literal["shared", "adapter", "model", "callable", "http"]


class Rewards(NamedTuple):
    """N samples scored; fp32 on the CPU. reward [N]: NaN where scoring failed. K heads: nominal, worst [N], mean, std
    [N, K]; None where the source has no heads."""

    reward: Tensor
    nominal: Tensor | None = None
    worst: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None


class RewardSource(Protocol):
    """Scores samples. name: for logs; num_heads: K, None where there are no heads."""

    name: str
    num_heads: int | None

    def __call__(self, samples: Samples) -> Rewards: ...


def resolve_kind(config: RewardConfig, policy: Any) -> Kind:
    """The kind that `auto` stands for. policy: the causal language model (or its trunk) the rewards are for."""
    raise NotImplementedError


def load_shared_head(source: str | Path, policy: Any, aggregation: str = "") -> EnsembleHead:
    """The heads of the EnsembleRewardModel in folder `source`, if its trunk is the policy's.

    aggregation: as RewardConfig's; "" the model's own; of one head always mean.
    """
    raise NotImplementedError


def load_adapter(source: str | Path, aggregation: str = "") -> tuple[Path, EnsembleHead]:
    """(the peft adapter's folder, the heads) of what `prudent train` with mode lora saved as adapter/."""
    raise NotImplementedError


def open_reward(
    config: PPOConfig, tokenizer: Any, prompts: Sequence[Prompt], device: torch.device | str, kind: Kind
) -> RewardSource:
    """The source of a reward of kind model, callable or http (shared and adapter live in the policy)."""
    raise NotImplementedError


def open_gold(name: str, tokenizer: Any, prompts: Sequence[Prompt]) -> RewardSource:
    """A gold scorer: vader, or MODULE:FUNCTION."""
    raise NotImplementedError
