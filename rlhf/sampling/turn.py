"""A prompt's token ids and the tokens that close its response."""

from __future__ import annotations

from typing import Any

from ...engine.text import ItemEncoder
from ..data.rows import Prompt, Text


class Turn:
    """A prompt's token ids and what is read after its response, by the rules that `Scorer` reads whole sequences.

    `closing` is what follows a complete response (the end of the assistant's turn, or EOS); a response that was cut off
    is closed likewise, so that every reward is read at the same kind of token.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        size = model.get_input_embeddings().num_embeddings
        self._encoder = ItemEncoder(tokenizer, append_eos=True, max_length=None, vocab_size=size)
        cut, whole = (self._ids({"prompt": "a", "response": "b", "complete": c}) for c in (False, True))
        if whole[: len(cut)] != cut or len(whole) == len(cut):
            raise ValueError("tokenizer: expected a chat template or EOS token that closes a response after its text")
        self.closing = whole[len(cut) :]
        eos = getattr(model.generation_config, "eos_token_id", None)
        # no special token is part of a response: read back from its text, the response would be another
        self.stop = {self.closing[0], *tokenizer.all_special_ids, *(eos if isinstance(eos, list) else [eos])} - {None}

    def _ids(self, item: dict[str, Any]) -> list[int]:
        return self._encoder.encode(item)[0]

    def prompt(self, item: Prompt) -> list[int]:
        """The ids up to where the response begins; messages need a tokeniser with a chat template."""
        return self._ids({"prompt": item, "response": "", "complete": False})

    def text(self, prompt: list[int], response: list[int]) -> str:
        """A response's text; see `response_text`."""
        return response_text(self._encoder.tokenizer, prompt, response)

    def whole(self, item: Prompt, response: Text) -> list[int]:
        """The ids of a prompt and its complete response, closed."""
        return self._ids({"prompt": item, "response": response, "complete": True})


def response_text(tokenizer: Any, prompt: list[int], response: list[int]) -> str:
    """A response's text. Where prompt and response are joined as they are, it keeps the blank it begins with, which a
    SentencePiece tokeniser leaves out of what it decodes on its own."""
    if not tokenizer.chat_template:
        before, both = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, prompt + response))
        if both.startswith(before):
            return both[len(before) :]
    return str(tokenizer.decode(response, skip_special_tokens=True))
