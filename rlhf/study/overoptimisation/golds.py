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

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...data.careful import Careful, repeated, words
from ...data.gold import VaderGold


def sentiment(responses: Sequence[str]) -> list[float]:
    return VaderGold()(responses)


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
