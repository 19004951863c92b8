"""What the reward says of the text it was trained on: the measure of how strange the policy's text is to it."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from ....engine.config import max_positions
from ...data.pairs import load_pairs
from ...sampling.prompts import Prompt
from ...sampling.turn import Turn
from ..batch import Samples

PAIRS = 64  # 128 responses: the mean of a std that varies by half is then known to about 5 %


class PreferenceTexts(NamedTuple):
    """Responses that people judged, as if they had been sampled; `prompts` continue the run's own list."""

    prompts: list[Prompt]
    samples: Samples


def preference_texts(source: str, turn: Turn, model_config: Any, count: int, seed: int) -> PreferenceTexts:
    """Chosen and rejected responses of up to `PAIRS` preference pairs, drawn by `seed`; those that fit the model.

    Args:
        source: what `load_pairs` reads.
        count: the run's own prompts, whose numbers come first.

    Raises:
        ValueError: for data that cannot be read, or of which no response fits.
    """
    pairs = load_pairs(source).pairs
    pairs = random.Random(f"preference data/{seed}").sample(pairs, min(PAIRS, len(pairs)))
    limit = max_positions(model_config)
    prompts: list[Prompt] = []
    rows: list[tuple[list[int], list[int], int]] = []
    for pair in pairs:
        opening = turn.prompt(pair.prompt)
        number = count + len(prompts)
        kept = len(rows)
        for response in (pair.chosen, pair.rejected):
            whole = turn.whole(pair.prompt, response)
            if limit is not None and len(whole) > limit:
                continue
            # a tokeniser may join the prompt's last letters with the response's first: then the response begins there
            shared = next((i for i, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), len(opening))
            rows.append((whole[:shared], [*whole[shared : -len(turn.closing)], turn.closing[0]], number))
        if len(rows) > kept:
            prompts.append(Prompt(pair.prompt, opening))
    if not rows:
        raise ValueError(f"data: expected a response that fits the policy's {limit} positions, got none in {source}")
    asked, said, numbers = (list(column) for column in zip(*rows, strict=True))
    return PreferenceTexts(prompts, Samples(asked, said, [True] * len(rows), numbers))
