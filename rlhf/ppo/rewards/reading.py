"""Encode samples as a reward on the policy's trunk was trained to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....engine.text import ItemEncoder
from ..batch import Samples
from .sources import Texts


class Reading:
    """The token ids that `Scorer` gives the heads for a sample's prompt and response.

    Often they are the sample's own ids and what closes them. They differ where the chat template writes a finished turn
    otherwise than it opens one (think blocks, stripped spaces), where the tokeniser spells the response's text with
    other tokens than were drawn, and where the reward has a tokeniser, an EOS rule or a length of its own.

    Args:
        encoder: the reward's, as its `Scorer` has it.
        texts: the run's prompts and the policy's tokeniser.
        skip: id that heads do not read at the end of a sequence; None: they read the last one.
    """

    def __init__(self, encoder: ItemEncoder, texts: Texts, skip: int | None = None) -> None:
        self._encoder, self._texts, self._skip = encoder, texts, skip

    def others(self, samples: Samples, closing: Sequence[int]) -> dict[int, list[int]]:
        """Number of a sample -> its ids, where they are not those of its prompt, response and `closing`.

        An empty list stands for a sample that the reward's template or tokeniser cannot read.
        """
        found = {}
        asked, said = self._texts.prompts_of(samples), self._texts.responses_of(samples)
        for index, (prompt, response) in enumerate(zip(asked, said, strict=True)):
            try:
                ids = self.encode(prompt, response)
            except Exception:  # a chat template may raise anything
                ids = []
            own = samples.responses[index][:-1] if samples.stopped[index] else samples.responses[index]
            if ids != [*samples.prompts[index], *own, *closing]:
                found[index] = ids
        return found

    def encode(self, prompt: Any, response: Any) -> list[int]:
        """The ids of a complete response to a prompt. Raises ValueError."""
        ids, _ = self._encoder.encode({"prompt": prompt, "response": response})
        while self._skip is not None and len(ids) > 1 and ids[-1] == self._skip:
            ids = ids[:-1]
        return ids
