"""Encode samples as a reward on the policy's trunk was trained to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ....engine.text import Encoded, ItemEncoder
from ..batch import Samples
from .sources import Texts


class HeadEncoder(NamedTuple):
    """encoder: the reward's, as its `Scorer` has it. skip: id that heads do not read at the end, if there is one."""

    encoder: ItemEncoder
    skip: int | None = None

    def encode(self, item: Any, name: str = "item") -> list[int]:
        """The ids that the heads read of an item. Raises ItemError, with `name`."""
        return self.read(item, name).ids

    def read(self, item: Any, name: str = "item") -> Encoded:
        """`encode`, and where the response begins, 0 if the heads do not read it. Raises as `encode`."""
        read = self.encoder.read(item, name)
        ids = read.ids
        while self.skip is not None and len(ids) > 1 and ids[-1] == self.skip:
            ids = ids[:-1]
        return read._replace(ids=ids, start=min(read.start, len(ids) - 1))


class Reading:
    """The token ids that `Scorer` gives the heads for a sample's prompt and response, and where the response begins.

    Usually they are the sample's own ids and the closing ids. They differ if the chat template writes a finished turn
    otherwise than it opens one (think blocks, stripped spaces), if the tokeniser encodes the response's text as other
    tokens than those drawn, or if the reward has its own tokeniser, EOS rule or length.

    Args:
        encoder: the reward's, as in its `Scorer`.
        texts: the run's prompts and the policy's tokeniser.
    """

    def __init__(self, encoder: HeadEncoder, texts: Texts) -> None:
        self._encoder, self._texts = encoder, texts

    def others(self, samples: Samples, closing: Sequence[int]) -> dict[int, Encoded]:
        """Sample number -> what is read, for the samples that are not read as prompt, response and `closing`.

        No ids stand for a sample that the reward's template or tokeniser cannot read.
        """
        others = {}
        reads = self._encoder.encoder.finds_response
        rows = zip(self._texts.prompts_of(samples), self._texts.responses_of(samples), strict=True)
        for index, (prompt, response) in enumerate(rows):
            try:
                read = self._encoder.read({"prompt": prompt, "response": response})
            except Exception:  # a chat template may raise anything
                read = Encoded([], False)
            own = samples.responses[index][:-1] if samples.stopped[index] else samples.responses[index]
            ids = [*samples.prompts[index], *own, *closing]
            if read.ids != ids or (reads and read.start != min(len(samples.prompts[index]), len(ids) - 1)):
                others[index] = read
        return others
