"""A judge who dislikes degenerate text, for experiments in which the true reward is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import torch

from .gold import VaderGold

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_PRICE = 0.8  # of a response that consists of repeated, or of unknown, word pairs; sentiment is from -1 to 1
_USUAL = 0.75  # quantile of the share of unknown word pairs among ordinary responses

Pair = tuple[str, str]


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def repeated(text: str) -> float:
    """The share of adjacent word pairs that occurred before in the text; 0 without a pair."""
    pairs = list(pairwise(words(text)))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


class Careful:
    """VADER of each word once, - .8 repeated - .8 salad.

    salad = max(0, u - q) / (1 - q). u is the share of the response's adjacent word pairs that the reference policy uses
    in no response to another training prompt; q is the upper quartile of u among its responses to the training prompts,
    so that three of four ordinary responses pay nothing and one without any known pair pays .8. (With the 95 %
    quantile, half of the shuffled responses of stories260k would pay less than .06.)

    Args:
        prompts: the training prompts.
        responses: the reference policy's responses to each.
    """

    name = "the careful judge"  # `name` and `meaning` are shown in reports
    meaning = (
        "VADER's sentiment of a response, each word counted once, less a price for repeated word pairs and for word "
        "pairs that the model does not use"
    )

    def __init__(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> None:
        self._seen: dict[Pair, str | None] = {}  # a pair -> the one prompt that it occurs with; None: several
        for prompt, texts in zip(prompts, responses, strict=True):
            for pair in {pair for text in texts for pair in pairwise(words(text))}:
                self._seen[pair] = prompt if self._seen.get(pair, prompt) == prompt else None
        shares = [
            self._unknown(prompt, text) for prompt, texts in zip(prompts, responses, strict=True) for text in texts
        ]
        usual = float(torch.tensor(shares, dtype=torch.float64).quantile(_USUAL))
        self.usual = min(usual, 0.9)  # responses are so different that no pair recurs: salad still costs something
        self._vader = VaderGold()

    def _unknown(self, prompt: str, text: str) -> float:
        pairs = list(pairwise(words(text)))
        unknown = sum(self._seen.get(pair, prompt) == prompt for pair in pairs)
        return unknown / len(pairs) if pairs else 0.0

    def __call__(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """Return one finite number per response to `prompt`; higher is better."""
        once = self._vader([" ".join(dict.fromkeys(words(text))) for text in responses])
        salad = [max(0.0, self._unknown(prompt, text) - self.usual) / (1 - self.usual) for text in responses]
        return [
            value - _PRICE * repeated(text) - _PRICE * share
            for value, text, share in zip(once, responses, salad, strict=True)
        ]
