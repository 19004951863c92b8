"""What the policy says: responses drawn by one of several engines behind one small interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import Samples
from .config import PPOConfig, RolloutConfig
from .prompts import Prompt


class Sampler(Protocol):
    """An engine. Equal prompts that stand together may share their prompt's keys and values."""

    name: str

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        """Draw one response a row.

        Args:
            model: a causal language model of transformers, peft-wrapped or not, in eval mode, its adapters as wanted.
            prompts: N lists of token ids, of any lengths.
            uniform: [N, max_new_tokens] fp32 in [0, 1) on the CPU; token t of row i spends uniform[i, t].

        Returns:
            The N responses, the stop token included where one was drawn, and whether one was (False: cut).
        """
        ...


def open_sampler(config: RolloutConfig, model: Any, stop: set[int], device: torch.device | str) -> Sampler:
    """The engine that `config.engine` names; auto: shared_prefix on a CPU, the faster of the others on a GPU."""
    raise NotImplementedError


def draw(
    sampler: Sampler,
    policy: Any,
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    config: PPOConfig,
    step: int,
    progress: bool = True,
) -> Samples:
    """`config.rollout.samples_per_prompt` responses to each of the prompts `indices`, in their order.

    The random numbers belong to (config.seed, step, number of the prompt, number of the sample): how rows are batched,
    and what was drawn before, change nothing but the trunk's rounding.
    """
    raise NotImplementedError
