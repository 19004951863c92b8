"""Sample one step's responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..sampling.draw import draw_responses
from ..sampling.prompts import Prompt
from ..sampling.sampler import Sampler
from .batch import Samples
from .config import PPOConfig


def draw(
    sampler: Sampler,
    policy: Any,
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    config: PPOConfig,
    step: int,
    progress: bool = True,
) -> Samples:
    """Sample `config.rollout.samples_per_prompt` responses to each of the prompts `indices`, in their order.

    Random numbers depend only on (config.seed, step, number of the prompt, number of the sample): batching and earlier
    draws change nothing but the trunk's rounding, except with engine continuous.

    Args:
        sampler: from `open_sampler`.
        policy: has `model` and the context `sampling()`.
        prompts: the run's prompts.
        indices: numbers of the prompts to sample, all different.
        config: rollout, seed.
        step: of the loop.
        progress: show a progress bar on stderr if it takes more than a second.
    """
    count = config.rollout.samples_per_prompt
    rows = [(index, sample) for index in indices for sample in range(count)]
    ids = [prompts[index].ids for index, _ in rows]
    keys = [f"{config.seed}/{step}/{index}/{sample}" for index, sample in rows]
    with policy.sampling():
        responses, stopped = draw_responses(sampler, policy.model, ids, keys, config.rollout, progress)
    return Samples(ids, responses, stopped, [index for index, _ in rows])
