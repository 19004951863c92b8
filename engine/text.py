"""Encode texts, chats, and prompts with responses as token ids, each with its proper end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from numbers import Integral
from textwrap import shorten
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from .errors import ItemError as ItemError
from .opening import Openings
from .rendered import RenderedTexts
from .spellings import REASONING, Message, spellings, with_other_contents, without_each


class Encoded(NamedTuple):
    """An item as a model reads it, which `Scorer` takes in place of the item.

    ids        token ids, truncated to the model's length
    truncated  whether they lost their beginning
    start      the place in `ids` of the response's first token; 0 for an item without a prompt, and for every item if
               the model does not average over the response
    """

    ids: list[int]
    truncated: bool
    start: int = 0


Item: TypeAlias = str | Sequence[int] | Sequence[Message] | Mapping[str, Any] | Encoded

# Chat templates get this date as today's, so that a text has the same tokens on every day: 26 July 2024, the default
# of Llama's templates.
_DATE = {
    "%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%F": "2024-07-26", "%j": "208",
    "%d": "26", "%-d": "26", "%e": "26", "%A": "Friday", "%a": "Fri", "%Z": "", "%z": "",
    "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM",
}  # fmt: skip
# a macro, because apply_chat_template cannot pass functions to a template; trim_blocks removes the newline
_STRFTIME_NOW = "{% macro strftime_now(format) %}{{ format" + "".join(
    f" | replace('{directive}', '{value}')" for directive, value in _DATE.items()
) + " }}{% endmacro %}\n"  # fmt: skip


class _Text(NamedTuple):
    """What a tokeniser gets. from_template: it has its special tokens; closed: EOS follows it if it lacks one."""

    text: str
    from_template: bool
    closed: bool


class ItemEncoder:
    """Encode items with one tokeniser and one EOS policy; `Scorer`'s docstring has the forms and rules.

    finds_response: whether `read` finds where the response begins. It encodes the prompt alone too, once for all the
    responses to it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        append_eos: bool,
        max_length: int | None,
        vocab_size: int,
        finds_response: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.finds_response = finds_response
        self._openings = Openings(self._opening_ids)
        self._rendered_texts = RenderedTexts(tokenizer, self._tokens, self._plain_ids, self._rendered)
        self._kept = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}

    def encode(self, item: Item, name: str = "item") -> tuple[list[int], bool]:
        """(token ids, whether the item was too long and lost its beginning). Raises an ItemError that has `name`."""
        return self._read(item, name, False)[:2]

    def read(self, item: Item, name: str = "item") -> Encoded:
        """`encode`, and where the response begins if the encoder finds it. Raises an ItemError that has `name`."""
        return self._read(item, name, self.finds_response)

    def text_of(self, item: Item) -> str:
        """The text of an item, special tokens of its end and of a chat template included, that a tokeniser reads."""
        written = self._written(item)
        if not isinstance(written, _Text):
            raise ItemError("expected a text or messages, got token ids")
        eos = self.tokenizer.eos_token if written.closed else None
        return written.text if eos is None or written.text.endswith(eos) else written.text + eos

    def read_all(self, items: Sequence[Item], first: int = 0) -> list[Encoded]:
        """`read` for many items, with one call of the tokeniser for all their texts; the ids are the same.

        Raises the ItemError of the first item that cannot be encoded; it is called item `first` + its place.
        """
        ids: list[list[int] | None] = [None] * len(items)
        if getattr(self.tokenizer, "is_fast", False):  # another may be anybody's code, which takes one text
            try:
                written = {
                    place: self._written(item)
                    for place, item in enumerate(items)
                    if not isinstance(item, Encoded) and not _is_rendered(item)
                }
                texts = {place: found for place, found in written.items() if isinstance(found, _Text)}
                for place, row in zip(texts, self._tokens_of(list(texts.values())), strict=True):
                    ids[place] = row
            except ItemError:  # reading one by one finds the item
                ids = [None] * len(items)
        return [
            self._read(item, f"item {first + place}", self.finds_response, known)
            for place, (item, known) in enumerate(zip(items, ids, strict=True))
        ]

    def _read(self, item: Item, name: str, finds_response: bool, known: list[int] | None = None) -> Encoded:
        """known: the item's ids, if they have been computed."""
        if isinstance(item, Encoded):
            return item
        try:
            if _is_rendered(item):
                ids, start = self._rendered_texts.read(item, finds_response)
            else:
                ids = self._ids(self._written(item)) if known is None else known
                start = self._openings.response_start(item, ids) if finds_response and ids else 0
            self._check(ids)
        except ItemError as error:
            raise ItemError(error.reason, name) from error.__cause__
        if self.max_length is None or len(ids) <= self.max_length:
            return Encoded(ids, False, start)
        # keep the end, which holds the response, and an opening BOS or CLS, which the trunk expects at the start
        opening = ids[:1] if ids[0] in self._kept and self.max_length > 1 else []
        lost = len(ids) - self.max_length
        return Encoded(opening + ids[lost + len(opening) :], True, start and max(start - lost, len(opening)))

    def _opening_ids(self, item: dict[str, Any]) -> list[int]:
        if item.get("prompt") == "" and not self.tokenizer.chat_template:
            return self._tokens("")
        try:
            return self._ids(self._mapping(item))
        except ItemError as error:
            reason = f"expected a prompt that can be read alone, to find where the response begins: {error.reason}"
            raise ItemError(reason) from error.__cause__

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise ItemError("expected text or token ids, got no tokens")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            raise ItemError(
                f"expected token ids in [0, {self.vocab_size}) (the trunk's vocabulary), got {low if low < 0 else high}"
            )

    def _ids(self, written: _Text | list[int]) -> list[int]:
        return self._tokens_of([written])[0] if isinstance(written, _Text) else written

    def _written(self, item: Item) -> _Text | list[int]:
        """The item as the text that the tokeniser gets; token ids as they are."""
        if isinstance(item, str):
            return self._plain(item, True)
        if isinstance(item, Mapping):
            return self._mapping(item)
        if isinstance(item, Sequence) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in item):
            return [int(i) for i in item]  # type: ignore[arg-type]
        if isinstance(item, Sequence) and all(isinstance(m, Mapping) for m in item):
            return self._chat(messages_of(item), None, True)
        raise ItemError(
            "expected a text, token ids, messages, or a mapping with prompt and response or messages, "
            f"got {type(item).__name__}"
        )

    def _mapping(self, item: Mapping[str, Any]) -> _Text:
        complete = item.get("complete", True)
        if not isinstance(complete, bool):
            raise ItemError(f"complete: expected true or false, got {complete!r}")
        tools = item.get("tools")
        if "messages" in item:
            return self._chat(messages_of(item["messages"]), tools, complete)
        if "prompt" not in item or "response" not in item:
            keys = ", ".join(map(str, item)) or "none"
            raise ItemError(f"expected the keys prompt and response, or messages, got {keys}")
        prompt, response = item["prompt"], item["response"]
        system: list[Message] = []
        if isinstance(prompt, Mapping) and "messages" in prompt:
            prompt, tools = prompt["messages"], prompt.get("tools", tools)
        elif isinstance(prompt, Mapping):
            system, prompt = _turns(prompt.get("system"), "system", "system"), prompt.get("text")
        if isinstance(prompt, str) and isinstance(response, str) and not tools and not self.tokenizer.chat_template:
            opening = "".join(f"{message['content']}\n\n" for message in system)
            return self._plain(opening + prompt + response, complete)
        turns = [*system, *_turns(prompt, "user", "prompt"), *_turns(response, "assistant", "response")]
        return self._chat(turns, tools, complete)

    def _plain(self, text: str, complete: bool) -> _Text:
        if text == "":
            raise ItemError("expected some text, got an empty string, which has no token to score")
        return _Text(text, False, self.append_eos and complete)

    def _plain_ids(self, text: str, complete: bool) -> list[int]:
        return self._ids(self._plain(text, complete))

    def _tokens_of(self, texts: list[_Text]) -> list[list[int]]:
        """The token ids of each text; with more than one, the tokeniser gets all of a kind at once."""
        ids: list[list[int]] = [[]] * len(texts)
        for from_template in dict.fromkeys(text.from_template for text in texts):
            places = [place for place, text in enumerate(texts) if text.from_template == from_template]
            # a template writes special tokens itself
            options = {"add_special_tokens": False} if from_template else {}
            batch = [texts[place].text for place in places]
            found = [self._tokens(batch[0], **options)] if len(batch) == 1 else self._tokens(batch, **options)
            for place, row in zip(places, found, strict=True):
                ids[place] = row
        for _, row in (pair for pair in zip(texts, ids, strict=True) if pair[0].closed):
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise ValueError(
                    "Scorer: tokenizer: expected an EOS token, because the model's append_eos is true, got none"
                )
            if row[-1:] != [eos]:
                row.append(eos)
        return ids

    def _tokens(self, text: str | list[str], **options: Any) -> list[Any]:
        """The token ids of a text, or a list of them for each of several."""
        texts = [text] if isinstance(text, str) else text
        try:
            for each in texts:
                each.encode()
        except UnicodeEncodeError as error:
            raise ItemError(f"expected text, got half of a surrogate pair, {each[error.start]!a}") from None
        try:
            return list(self.tokenizer(text, **options)["input_ids"])
        except Exception as error:  # a tokeniser may be anybody's code
            raise ItemError(f"the tokeniser cannot read it: {_sentence(error)}") from error

    def _chat(self, messages: list[Message], tools: Any, complete: bool) -> _Text:
        if not self.tokenizer.chat_template:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
            raise ItemError(
                "expected plain text, because the tokeniser has no chat template, got "
                f"{'tools' if tools else 'messages'} (roles: {roles}): give plain texts, or a model whose tokeniser "
                "has a chat template"
            )
        if not messages:
            raise ItemError("expected at least one message, got none")
        last = messages[-1]
        options: dict[str, bool] = {}
        if not complete and last.get("content"):
            options = {"continue_final_message": True}
        elif not complete and any(last.get(key) for key in ("tool_calls", *REASONING)):
            raise ItemError("complete: expected true, because the last message has no content to continue, got false")
        elif not complete:  # nothing to continue: only open the turn
            messages, options = messages[:-1], {"add_generation_prompt": True}
        return _Text(self._rendered(messages, _tools_of(tools), options), True, False)

    def _rendered(self, messages: list[Message], tools: list[Any] | None, options: dict[str, bool]) -> str:
        """Render the chat template. ItemError if it fails, or leaves out a part of the messages or the tools."""

        def render(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
            template = self.tokenizer.get_chat_template(None, tools)
            given = {"chat_template": _STRFTIME_NOW + template} if "strftime_now" in template else {}
            return str(self.tokenizer.apply_chat_template(messages, tools, tokenize=False, **given, **options))

        spelling, text = _first_that_works(lambda spelled: render(spelled, tools), spellings(messages))
        others = chain(without_each(spelling, tools), with_other_contents(spelling, tools, text))
        for what, other, other_tools in others:
            try:
                left_out = render(other, other_tools) == text
            except Exception:  # the template needs the part that was removed
                left_out = False
            if left_out:
                raise ItemError(f"expected a chat template that writes {what}, got one that leaves it out")
        return text


def _is_rendered(item: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(item, Mapping) and "rendered" in item


def messages_of(value: Any) -> list[Message]:
    """The messages in `value`, without keys whose value is None. Raises ItemError.

    A message has a role and a content, both texts; it may lack the content if it has tool calls or reasoning.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ItemError(f"expected messages (role, content), got {type(value).__name__}")
    messages: list[Message] = []
    for message in value:
        found = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
        calls = found.get("tool_calls")
        absent = "" if calls or any(found.get(key) for key in REASONING) else None
        if not isinstance(found.get("role"), str) or not isinstance(found.get("content", absent), str):
            raise ItemError(f"expected messages with a role and a content that are texts, got {message!r:.80}")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
            raise ItemError(f"tool_calls: expected a list of objects, got {calls!r:.80}")
        messages.append(found)
    return messages


def _turns(value: Any, role: str, name: str) -> list[Message]:
    """A text as one message of `role`, or the messages in `value`."""
    try:
        return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(value)
    except ItemError as error:
        raise ItemError(f"{name}: {error.reason}") from None


def _tools_of(tools: Any) -> list[Any] | None:
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ItemError(f"tools: expected a list of objects, got {tools!r:.80}")
    return tools or None


def _first_that_works(
    render: Callable[[list[dict[str, Any]]], str], spelled: Iterator[list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], str]:
    first: Exception | None = None
    for spelling in spelled:
        try:
            return spelling, render(spelling)
        except Exception as error:  # a template may raise anything
            first = first or error
    assert first is not None
    raise ItemError(f"the chat template refuses it: {_sentence(first)}") from first


def _sentence(error: Exception) -> str:
    return shorten(str(error), 200) or type(error).__name__
