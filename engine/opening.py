"""Find where the response begins in an item's token ids: where they leave those of its prompt alone."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_KEPT = 1 << 14  # encoded prompts, of 4 bytes a token: prompts repeat, often hundreds of times


class Openings:
    """Prompts encoded alone, their turn opened; each once for all the responses to it.

    encode: {"prompt" or "messages", ..., "complete": False} -> ids up to where the response begins.
    """

    def __init__(self, encode: Callable[[dict[str, Any]], list[int]]) -> None:
        self._encode = encode
        self._ids: dict[bytes, array[int]] = {}

    def response_start(self, item: Any, ids: list[int]) -> int:
        """The place in `ids` of the response's first token: the end of what they share with the opened turn.

        A token that holds the end of the prompt and the beginning of the response counts as the response's; at least
        the last token is the response's. 0 for a plain text, for token ids and without a prompt.
        """
        prompt = _prompt_of(item)
        if prompt is None:
            return 0
        return shared_start(self._opened(prompt), ids)

    def _opened(self, prompt: dict[str, Any]) -> Sequence[int]:
        key = hashlib.blake2b(repr(prompt).encode(), digest_size=16).digest()
        if key not in self._ids:
            if len(self._ids) >= _KEPT:
                self._ids.clear()
            self._ids[key] = array("i", self._encode(prompt))
        return self._ids[key]


def shared_start(opened: Sequence[int], ids: Sequence[int]) -> int:
    """How many ids `opened` and `ids` share at their beginning, at most all but the last of `ids`."""
    last = len(ids) - 1
    shared = (place for place, (one, other) in enumerate(zip(opened, ids[:last], strict=False)) if one != other)
    return next(shared, min(len(opened), last))


def _prompt_of(item: Any) -> dict[str, Any] | None:
    """The item whose ids end where the response of `item` begins; None if it has no prompt.

    Of messages, the response is the last one of role assistant, with what follows it; the last of all if none is.
    """
    tools = item.get("tools") if isinstance(item, Mapping) else None
    if isinstance(item, Mapping) and "messages" not in item:
        return {"prompt": item["prompt"], "response": "", "tools": tools, "complete": False}
    messages = item["messages"] if isinstance(item, Mapping) else item
    if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
        return None
    answers = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
    before = list(messages[: answers[-1] if answers else -1])
    if not before:
        return None
    opened = [*before, {"role": "assistant", "content": ""}]
    return {"messages": opened, "tools": tools, "complete": False}
