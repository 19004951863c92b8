"""Sample responses to given prompts in batches; a response depends on its prompt and key alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .config import RolloutConfig
from .sampler import Sampler, rows_at_once
from .tokens import keyed_uniforms


def draw_responses(
    sampler: Sampler,
    model: Any,
    prompts: Sequence[list[int]],
    keys: Sequence[str],
    rollout: RolloutConfig,
    progress: bool = True,
) -> tuple[list[list[int]], list[bool]]:
    """Return N responses as ids, each with its stop token if one was drawn, and whether one was (False: cut off).

    Random numbers depend on a row's key alone: batching changes nothing but the trunk's rounding, except with engine
    continuous.

    Args:
        sampler: from `open_sampler`.
        model: the language model to sample from, in eval mode.
        prompts: N lists of ids, the `samples_per_prompt` rows of a prompt adjacent.
        keys: N strings, all different.
        rollout: samples_per_prompt, max_new_tokens, batch_rows.
        progress: show a progress bar on stderr if it takes more than a second.
    """
    # prompts of similar length share a batch, because padding is computed too; a prompt's samples stay together
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    size = rows_at_once(rollout, len(prompts) // rollout.samples_per_prompt)
    responses: list[list[int]] = [[]] * len(prompts)
    stopped = [False] * len(prompts)
    with tqdm(total=len(prompts), desc="rollout", unit="resp", delay=1, disable=not progress, leave=False) as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            uniform = torch.stack([keyed_uniforms(keys[row], rollout.max_new_tokens) for row in batch])
            drawn = sampler(model, [prompts[row] for row in batch], uniform)
            for row, response, ended in zip(batch, *drawn, strict=True):
                responses[row], stopped[row] = response, ended
            bar.update(len(batch))
    return responses, stopped
