"""Rewards from another model, which reads the texts with its own tokeniser."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....engine import Scorer
from ..batch import Samples
from .sources import Rewards, Texts


class ModelReward:
    """An EnsembleRewardModel or one-head sequence classifier, with its own tokeniser and template.

    Args:
        name: for logs and errors.
        scorer: the loaded model; its heads' own aggregation is used.
        texts: prompts and the policy's tokeniser.
    """

    def __init__(self, name: str, scorer: Scorer, texts: Texts) -> None:
        self.name, self._scorer, self._texts = name, scorer, texts
        self.num_heads: int | None = scorer.model.score.num_heads

    def __call__(self, samples: Samples, seed: int | None = None) -> Rewards:
        """Return the rewards of all samples, in their order; with `seed`, sampled as by `heads.judge`.

        A response that was cut off is closed like a complete one, as for heads on the policy's trunk, because another
        last token would change the reward. `reward.missing_eos_penalty` penalises being cut off.
        """
        rows = zip(self._texts.prompts_of(samples), self._texts.responses_of(samples), strict=True)
        scores = self._scorer.score([{"prompt": p, "response": r} for p, r in rows], seed=seed)
        reward = _column(scores.reward)
        if self.num_heads == 1:
            return Rewards(reward, mean=scores.mean, std=scores.std, distance=scores.distance)
        worst = scores.mean.amin(dim=1)  # not scores.worst, which is sampled too
        return Rewards(reward, _column(scores.nominal), worst, scores.mean, scores.std, scores.distance)


def _column(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)
