"""Sample one step's responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..sampling.prompts import Prompt
from ..sampling.sampler import Sampler, rows_at_once
from ..sampling.tokens import keyed_uniforms
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
    rollout = config.rollout
    count = rollout.samples_per_prompt
    rows = [(index, sample) for index in indices for sample in range(count)]
    # prompts of similar length share a batch, because padding is computed too; equal lengths are ordered by number
    order = sorted(range(len(rows)), key=lambda i: (len(prompts[rows[i][0]].ids), rows[i]))
    step_size = rows_at_once(rollout, len(indices))  # a prompt's samples stay together
    responses: list[list[int]] = [[]] * len(rows)
    stopped = [False] * len(rows)
    bar = tqdm(total=len(rows), desc="rollout", unit="resp", delay=1, disable=not progress, leave=False)
    with bar, policy.sampling():
        for start in range(0, len(order), step_size):
            batch = order[start : start + step_size]
            ids = [prompts[rows[i][0]].ids for i in batch]
            keys = [f"{config.seed}/{step}/{rows[i][0]}/{rows[i][1]}" for i in batch]
            uniform = torch.stack([keyed_uniforms(key, rollout.max_new_tokens) for key in keys])
            for i, response, ended in zip(batch, *sampler(policy.model, ids, uniform), strict=True):
                responses[i], stopped[i] = response, ended
            bar.update(len(batch))
    return Samples([prompts[i].ids for i, _ in rows], responses, stopped, [i for i, _ in rows])
