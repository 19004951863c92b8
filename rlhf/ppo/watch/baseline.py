"""Turn preference texts into samples: the baseline for the heads' std and disagreement on the policy's samples."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from ....engine.config import longest_in_company
from ...data.pairs import load_pairs, readable_pairs
from ...data.rows import Text
from ...sampling.prompts import Prompt
from ...sampling.turn import Turn
from ..batch import Samples

PAIRS = 64  # 128 responses: the mean of a std that varies by 50 % is known to about 5 %


class PreferenceTexts(NamedTuple):
    """Responses of preference pairs as samples; the numbers of their `prompts` continue the run's own.

    bad_rows: how many rows of the data were skipped.
    """

    prompts: list[Prompt]
    samples: Samples
    bad_rows: int


def preference_texts(
    source: str, turn: Turn, model_config: Any, count: int, seed: int, *, skip_bad_rows: bool = False
) -> PreferenceTexts:
    """Return the responses of up to `PAIRS` random preference pairs, without those too long for the model.

    Args:
        source: preference data for `load_pairs`.
        count: number of the run's own prompts.
        skip_bad_rows: leave out rows that are broken or that the policy's template or tokeniser refuses.

    Raises:
        ValueError: for data that cannot be read or has no response that fits.
    """
    data = load_pairs(source, skip_bad_rows=skip_bad_rows)
    drawn = random.Random(f"preference data/{seed}").sample(data.pairs, min(PAIRS, len(data.pairs)))
    (pairs,) = readable_pairs(
        [drawn],
        [lambda item, _: turn.whole(item["prompt"], item["response"])],
        data.counts,
        prompt_encoders=[lambda item, _: turn.prompt(item["prompt"])],
        skip_bad_rows=skip_bad_rows,
    )
    limit = longest_in_company(model_config)
    prompts: list[Prompt] = []
    rows: list[tuple[list[int], list[int], int, Text]] = []
    for pair in pairs:
        opening = turn.prompt(pair.prompt)
        number = count + len(prompts)
        kept = len(rows)
        for response in (pair.chosen, pair.rejected):
            whole = turn.whole(pair.prompt, response)
            if limit is not None and len(whole) > limit:
                continue
            # a tokeniser may merge the end of the prompt with the start of the response, which then begins there
            shared = next((i for i, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), len(opening))
            rows.append((whole[:shared], [*whole[shared : -len(turn.closing)], turn.closing[0]], number, response))
        if len(rows) > kept:
            prompts.append(Prompt(pair.prompt, opening))
    if not rows:
        raise ValueError(f"data: expected a response that fits the policy's {limit} positions, got none in {source}")
    openings, responses, numbers, texts = (list(column) for column in zip(*rows, strict=True))
    samples = Samples(openings, responses, [True] * len(rows), numbers, texts)
    return PreferenceTexts(prompts, samples, data.counts["bad_rows"])
