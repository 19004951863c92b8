"""Turn a prompt into token ids, close its response, and turn the response's ids into text."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from ...engine.config import max_positions
from ...engine.likelihood import special_ids
from ...engine.text import ItemEncoder
from ..data.rows import Prompt, Text
from ..job.log import say_once


class Turn:
    """Tokenise prompts and responses by the rules by which `Scorer` reads whole sequences.

    Attributes:
        closing: ids that close a complete response: the end of the assistant's turn, or EOS. Heads read the last of
            them; a response that was cut off is closed too, so that every reward is read at the same kind of token.
        stop: ids that end a response during sampling.
        special: ids that the tap `logprob` skips.
        ending: finds where the text of a sampled response ends.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        size = model.get_input_embeddings().num_embeddings
        self._encoder = ItemEncoder(tokenizer, append_eos=True, max_length=None, vocab_size=size)
        limit = max_positions(model.config.get_text_config())
        self._reader = ItemEncoder(tokenizer, append_eos=True, max_length=limit, vocab_size=size)
        try:
            cut, whole = (self._ids({"prompt": "a", "response": "b", "complete": c}) for c in (False, True))
        except ValueError as error:
            raise ValueError(
                "tokenizer: expected a chat template that writes a response unchanged, so that one can be sampled, "
                f"got: {' '.join(str(error).split())[:200]}"
            ) from error
        if whole[: len(cut)] != cut or len(whole) == len(cut):
            raise ValueError("tokenizer: expected a chat template or EOS token that closes a response after its text")
        self.closing = whole[len(cut) :]
        self.ending = Ending(tokenizer)
        self.special = special_ids(tokenizer)
        eos = getattr(model.generation_config, "eos_token_id", None)
        # no special token is part of a response: its text, tokenised again, would be another response
        self.stop = {*self.ending.stop, *tokenizer.all_special_ids, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.stop = {token for token in self.stop if token < size}
        if self.ending.text:
            say_once(
                f"sampling: a response ends at its first {self.ending.text!r}, because the chat template closes a turn "
                "with this text and without a special token"
            )

    def _ids(self, item: dict[str, Any]) -> list[int]:
        return self._encoder.encode(item)[0]

    def prompt(self, item: Prompt) -> list[int]:
        """Return the ids up to where the response begins; messages need a tokeniser with a chat template."""
        return self._ids({"prompt": item, "response": "", "complete": False})

    def text(self, prompt: list[int], response: list[int], stopped: bool = False) -> str:
        """A response's text; see `Ending.response_text`."""
        return self.ending.response_text(prompt, response, stopped)

    def whole(self, item: Prompt, response: Text) -> list[int]:
        """Return the ids of a prompt and its complete response, closed."""
        return self._ids({"prompt": item, "response": response})

    def read(self, item: Prompt, response: Text) -> list[int]:
        """Return `whole` as a `Scorer` on this model reads it, cut at the start to the model's number of positions."""
        return self._reader.encode({"prompt": item, "response": response})[0]


class Ending:
    """Find where the text of a response ends, according to a tokeniser's chat template.

    Most templates close a turn with a special token, some with plain text in front of it, some with plain text alone
    (one newline or two). Plain text may be several tokens, or a part of one, so it is searched for in the decoded text.

    Attributes:
        text: the plain text that closes a turn alone; "" if a special token closes it, or without a template EOS.
        lead: the plain text in front of the special token that closes a turn; it is not part of the response.
        stop: ids that end a response: the special token that closes a turn, or every token that contains `text`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = self.lead = ""
        self.stop: set[int] = set()
        closing = _closing_text(tokenizer)
        marks = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in _marks(tokenizer)}
        found = {closing.index(mark): mark for mark in sorted(marks, key=len) if mark in closing}
        if found:
            first = min(found)
            self.lead = closing[:first]
            self.stop = {marks[found[first]]}
        elif closing:
            self.text = closing
            texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
            self.stop = {token for token, text in enumerate(texts) if closing in text}

    def cut(self, response: list[int], stopped: bool, least: int = 0) -> tuple[list[int], bool]:
        """Cut a sampled response after the token that completes `text`; return it, and whether it ended by itself.

        least: an ending in the first `least` tokens does not count (`rollout.min_new_tokens`).
        """
        if not self.text or self._position(response, least) < 0:
            return response, stopped
        counts = range(least + 1, len(response) + 1)
        end = counts[bisect_left(counts, True, key=lambda count: self._position(response[:count], least) >= 0)]
        return response[:end], True

    def _position(self, response: list[int], before: int) -> int:
        """Where in the response's text `text` stands, completed after the first `before` tokens; -1: nowhere."""
        start = len(self._decoded(response[:before])) - len(self.text) + 1
        return self._decoded(response).find(self.text, max(start, 0))

    def response_text(self, prompt: list[int], response: list[int], stopped: bool) -> str:
        """The text of a response, without what ended it.

        Args:
            prompt: its ids.
            response: as drawn, its stop token included.
            stopped: whether the last id ended it; False: it was cut off.

        Without a chat template the text keeps its leading blank, which a SentencePiece tokeniser drops when it decodes
        the response alone.
        """
        if not stopped:
            return self._joined(prompt, response)
        if self.text and (position := self._position(response, len(response) - 1)) >= 0:
            return self._decoded(response)[:position]
        return self._joined(prompt, response[:-1]).removesuffix(self.lead)

    def _joined(self, prompt: list[int], response: list[int]) -> str:
        if not self._tokenizer.chat_template:
            before, both = self._decoded(prompt), self._decoded(prompt + response)
            if both.startswith(before):
                return both[len(before) :]
        return self._decoded(response)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _closing_text(tokenizer: Any) -> str:
    """Return the text that a chat template writes after a complete response; "" without a template."""
    if not tokenizer.chat_template:
        return ""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    cut = str(tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True))
    return whole[len(cut) :] if whole.startswith(cut) else ""


def _marks(tokenizer: Any) -> set[str]:
    """Return special and added tokens: some tokenisers do not declare their end-of-turn token special."""
    return {mark for mark in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if mark.strip()}
