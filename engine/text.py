"""What people want scored, as token ids: texts, chats, prompt and response, with one explicit ending policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
Item: TypeAlias = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]


class ItemEncoder:
    """Item -> token ids, by one tokeniser and one EOS policy. The forms and rules are in `Scorer`'s docstring."""

    def __init__(self, tokenizer: Any, *, append_eos: bool, max_length: int | None, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.max_length = max_length
        self.vocab_size = vocab_size
        self._kept = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}

    def encode(self, item: Item, name: str = "item") -> tuple[list[int], bool]:
        """(token ids, whether the item was too long and lost its beginning)."""
        ids = self._ids(item, name)
        if not ids:
            raise ValueError(f"Scorer: {name}: expected text or token ids, got an empty one")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"Scorer: {name}: expected token ids in [0, {self.vocab_size}) (the trunk's vocabulary), "
                f"got {low if low < 0 else high}"
            )
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, False
        # the end carries the response; an opening BOS or CLS is what the trunk knows sequences to start with
        opening = ids[:1] if ids[0] in self._kept and self.max_length > 1 else []
        return opening + ids[len(ids) - self.max_length + len(opening) :], True

    def _ids(self, item: Item, name: str) -> list[int]:
        if isinstance(item, str):
            return self._plain(item, True, name)
        if isinstance(item, Mapping):
            return self._mapping(item, name)
        if isinstance(item, Sequence) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in item):
            return [int(i) for i in item]  # type: ignore[arg-type]
        if isinstance(item, Sequence) and all(isinstance(m, Mapping) for m in item):
            return self._chat(_messages(item, name), True, name)
        raise ValueError(
            f"Scorer: {name}: expected a text, token ids, messages, or a mapping with prompt and response or messages, "
            f"got {type(item).__name__}"
        )

    def _mapping(self, item: Mapping[str, Any], name: str) -> list[int]:
        complete = item.get("complete", True)
        if not isinstance(complete, bool):
            raise ValueError(f"Scorer: {name}: complete: expected true or false, got {complete!r}")
        if "messages" in item:
            return self._chat(_messages(item["messages"], name), complete, name)
        if "prompt" not in item or "response" not in item:
            keys = ", ".join(map(str, item)) or "none"
            raise ValueError(f"Scorer: {name}: expected the keys prompt and response, or messages, got {keys}")
        prompt, response = item["prompt"], item["response"]
        if isinstance(prompt, str) and isinstance(response, str) and not self.tokenizer.chat_template:
            return self._plain(prompt + response, complete, name)
        turns = _turns(prompt, "user", f"{name}: prompt") + _turns(response, "assistant", f"{name}: response")
        return self._chat(turns, complete, name)

    def _plain(self, text: str, complete: bool, name: str) -> list[int]:
        if text == "":
            raise ValueError(f"Scorer: {name}: expected some text, got an empty string, which has no token to score")
        ids = list(self.tokenizer(text)["input_ids"])
        if self.append_eos and complete:
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise ValueError(
                    "Scorer: tokenizer: expected an EOS token, because the model's append_eos is true, got none"
                )
            if ids[-1:] != [eos]:
                ids.append(eos)
        return ids

    def _chat(self, messages: list[Message], complete: bool, name: str) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"Scorer: {name}: expected plain text, because the tokeniser has no chat template, got messages: "
                "give plain texts, or a model whose tokeniser has a chat template"
            )
        if not messages:
            raise ValueError(f"Scorer: {name}: expected at least one message, got none")
        if complete:
            options = {}
        elif messages[-1]["content"]:
            options = {"continue_final_message": True}
        else:  # nothing to continue: the turn is opened and no more
            messages, options = messages[:-1], {"add_generation_prompt": True}
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # the template writes its own


def _turns(value: Any, role: str, name: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, name)


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"Scorer: {name}: expected messages (role, content), got {type(value).__name__}")
    for message in value:
        fine = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not fine or not isinstance(message.get("content"), str):
            raise ValueError(
                f"Scorer: {name}: expected messages with a role and a content that are texts, got {message!r}"
            )
    return list(value)
