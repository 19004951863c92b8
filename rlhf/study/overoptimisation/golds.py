"""Judges that stand for the true reward: deterministic, of a prompt and a response's text.

sentiment  VADER's compound sentiment.
careful    a judge who dislikes degenerate text: VADER of each word once, less .8 x the share of repeated word pairs,
           less .8 x word salad (`Careful`).
lexicon    the number of positive less the number of negative words of VADER's lexicon, each occurrence paid: a gold
           that keeps rising off the support, where a price on distance must lose.
variety    the share of different words, + .5 for a finished sentence, less the share of repeated word pairs.
linear     a random linear function of the standardised features: exactly what a head can learn; a price must lose.

variety and linear choose constants and are not reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...data.gold import VaderGold

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


def sentiment(responses: Sequence[str]) -> list[float]:
    return VaderGold()(responses)


class Careful:
    """VADER of each word once, - .8 repeated - .8 salad.

    salad = max(0, u - q) / (1 - q). u is the share of the response's adjacent word pairs that the reference policy uses
    in no response to another training prompt; q is the upper quartile of u among its responses to the training prompts,
    so that three of four ordinary responses pay nothing and one without any known pair pays .8. (With the 95 %
    quantile, half of the shuffled responses of stories260k would pay less than .06.)
    """

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
        once = self._vader([" ".join(dict.fromkeys(words(text))) for text in responses])
        salad = [max(0.0, self._unknown(prompt, text) - self.usual) / (1 - self.usual) for text in responses]
        return [
            value - _PRICE * repeated(text) - _PRICE * share
            for value, text, share in zip(once, responses, salad, strict=True)
        ]


def lexicon(responses: Sequence[str]) -> list[float]:
    valence: dict[str, float] = VaderGold().lexicon
    return [
        float(sum((found > 0) - (found < 0) for word in words(text) if (found := valence.get(word)) is not None))
        for text in responses
    ]


def variety(responses: Sequence[str]) -> list[float]:
    result = []
    for text in responses:
        said = words(text)
        different = len(set(said)) / len(said) if said else 0.0
        result.append(different + 0.5 * text.rstrip().endswith((".", "!", "?")) - repeated(text))
    return result


def scorer(name: str, training: Mapping[str, Sequence[str]]) -> Callable[[str, Sequence[str]], list[float]]:
    """The gold `name` as a function of a prompt and its responses; `training`: the reference policy's, by prompt.

    Raises:
        ValueError: for linear, which judges features.
    """
    if name == "careful":
        return Careful(list(training), list(training.values()))
    plain = {"sentiment": sentiment, "lexicon": lexicon, "variety": variety}.get(name)
    if plain is None:
        raise ValueError(f"gold: expected one that reads texts, got {name}")
    return lambda _, responses: plain(responses)


def linear(standardised: Tensor) -> Tensor:
    """[..., D] standardised features -> [...] fp64: the same random direction for every D."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(standardised.shape[-1], generator=generator, dtype=torch.float64)
    values: Tensor = standardised.double() @ (direction / len(direction) ** 0.5)
    return values
