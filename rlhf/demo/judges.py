"""The demo's judges, whose scores stand for the true reward, and what they say of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..data.careful import Careful
from ..data.gold import VaderGold
from ..data.rows import Prompt
from ..sampling.stored import Rollout
from .candidates import Candidates
from .rewards import Fitted, rewards_of

CAREFUL, VADER = "careful", "vader"


class Judge(Protocol):
    """Scores responses to a prompt; name, meaning: for reports."""

    name: str
    meaning: str

    def __call__(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """One finite number per response; higher is better."""
        ...


class _Vader:
    """VADER, which does not read the prompt."""

    name, meaning = VaderGold.name, VaderGold.meaning

    def __init__(self) -> None:
        self._gold = VaderGold()

    def __call__(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return self._gold(responses)


def judges_of(training: Sequence[Rollout]) -> dict[str, Judge]:
    """The careful judge, who knows the word pairs of the training prompts' responses, and VADER."""
    careful = Careful([str(rollout.prompt) for rollout in training], [rollout.responses for rollout in training])
    return {CAREFUL: careful, VADER: _Vader()}


def tensor_of(judge: Judge, prompt: Prompt, responses: Sequence[str]) -> Tensor:
    """[S] fp64."""
    return torch.tensor(judge(str(prompt), responses), dtype=torch.float64)


def judged_candidates(judge: Judge, candidates: Candidates) -> Tensor:
    """[P, N + A] fp64."""
    pairs = zip(candidates.prompts, candidates.texts, strict=True)
    return torch.stack([tensor_of(judge, prompt, texts) for prompt, texts in pairs])


def proxies_of(fitted: Fitted, candidates: Candidates, price: float) -> dict[str, Tensor]:
    """Reward's name -> [P, N + A]."""
    shape = candidates.features.shape[:2]
    found = rewards_of(fitted, candidates.features.flatten(0, 1), price)
    return {name: values.view(shape) for name, values in found.items()}
