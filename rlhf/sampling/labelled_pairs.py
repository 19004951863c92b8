"""Make preference pairs from a gold scorer, with a share of the labels flipped."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .stored import Rollout


class GoldPairs(NamedTuple):
    """P pairs of sampled responses in their true order: the gold scorer prefers `better` to `worse`.

    prompt         [P] the prompt's number       better, worse  [P] numbers of its two responses
    flipped        [P] bool, whether the label says the opposite
    drawn, ties    number of pairs drawn, and of those to whose responses gold gives equal scores
    """

    prompt: list[int]
    better: list[int]
    worse: list[int]
    flipped: Tensor
    drawn: int
    ties: int

    def features(self, rollouts: Sequence[Rollout], noisy: bool) -> tuple[Tensor, Tensor]:
        """Return (chosen [P, D], rejected [P, D]) by the noisy labels or by the true ones."""
        sides = [
            torch.stack([rollouts[p].features[r] for p, r in zip(self.prompt, column, strict=True)])
            for column in (self.better, self.worse)
        ]
        if not noisy:
            return sides[0], sides[1]
        flip = self.flipped[:, None]
        return torch.where(flip, sides[1], sides[0]), torch.where(flip, sides[0], sides[1])

    def rows(self, rollouts: Sequence[Rollout], gold: Sequence[Tensor], noisy: bool) -> list[dict[str, Any]]:
        """Return rows for a JSON-lines file that `prudent train` and `prudent eval` read."""
        rows = []
        for p, better, worse, flipped in zip(self.prompt, self.better, self.worse, self.flipped.tolist(), strict=True):
            chosen, rejected = (worse, better) if noisy and flipped else (better, worse)
            rows.append(
                {
                    "prompt": rollouts[p].prompt,
                    "chosen": rollouts[p].responses[chosen],
                    "rejected": rollouts[p].responses[rejected],
                    "gold_chosen": float(gold[p][chosen]),
                    "gold_rejected": float(gold[p][rejected]),
                    "flipped": flipped,
                }
            )
        return rows


def make_pairs(
    gold: Sequence[Tensor],
    prompts: Sequence[int],
    per_prompt: int,
    label_noise: float,
    seed: int,
    *,
    at_most: int | None = None,
) -> GoldPairs:
    """Draw `per_prompt` pairs of each prompt's responses, order them by gold, drop ties, flip a share of the labels.

    Args:
        gold: prompt number -> [S] gold scores of its responses.
        prompts: the numbers of the prompts to draw from.
        label_noise: the share flipped, exact to within one pair.
        at_most: keep so many of the pairs, drawn at random; None: all.

    Raises:
        ValueError: if all drawn pairs are ties.
    """
    draw = random.Random(seed)
    kept: list[tuple[int, int, int]] = []
    drawn = ties = 0
    for prompt in prompts:
        scores = gold[prompt].tolist()
        every = list(combinations(range(len(scores)), 2))
        for a, b in sorted(draw.sample(every, min(per_prompt, len(every)))):
            drawn += 1
            if scores[a] == scores[b]:
                ties += 1
            else:
                kept.append((prompt, a, b) if scores[a] > scores[b] else (prompt, b, a))
    if not kept:
        raise ValueError(f"pairs: expected the gold scorer to tell some pairs apart, got {ties} ties of {drawn}")
    if at_most is not None and at_most < len(kept):
        kept = [kept[i] for i in sorted(draw.sample(range(len(kept)), at_most))]
    flipped = torch.zeros(len(kept), dtype=torch.bool)
    flipped[draw.sample(range(len(kept)), round(label_noise * len(kept)))] = True
    prompt_of, better, worse = (list(column) for column in zip(*kept, strict=True))
    return GoldPairs(prompt_of, better, worse, flipped, drawn, ties)
