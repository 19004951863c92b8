"""Encode texts, chats, and prompts with responses as token ids, each with its proper end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from numbers import Integral
from textwrap import shorten
from typing import Any, NamedTuple, TypeAlias

from .errors import ItemError as ItemError
from .opening import Openings
from .rendered import RenderedTexts

Message: TypeAlias = Mapping[str, Any]


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

REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # keys of a message; templates read the first two

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
        self._rendered_texts = RenderedTexts(tokenizer, self._tokens, self._plain, self._rendered)
        self._kept = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}

    def encode(self, item: Item, name: str = "item") -> tuple[list[int], bool]:
        """(token ids, whether the item was too long and lost its beginning). Raises an ItemError that has `name`."""
        return self._read(item, name, False)[:2]

    def read(self, item: Item, name: str = "item") -> Encoded:
        """`encode`, and where the response begins if the encoder finds it. Raises an ItemError that has `name`."""
        return self._read(item, name, self.finds_response)

    def _read(self, item: Item, name: str, finds_response: bool) -> Encoded:
        if isinstance(item, Encoded):
            return item
        try:
            if isinstance(item, Mapping) and "rendered" in item:
                ids, start = self._rendered_texts.read(item, finds_response)
            else:
                ids = self._ids(item)
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
            return self._mapping(item)
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

    def _ids(self, item: Item) -> list[int]:
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

    def _mapping(self, item: Mapping[str, Any]) -> list[int]:
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

    def _plain(self, text: str, complete: bool) -> list[int]:
        if text == "":
            raise ItemError("expected some text, got an empty string, which has no token to score")
        ids = self._tokens(text)
        if self.append_eos and complete:
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise ValueError(
                    "Scorer: tokenizer: expected an EOS token, because the model's append_eos is true, got none"
                )
            if ids[-1:] != [eos]:
                ids.append(eos)
        return ids

    def _tokens(self, text: str, **options: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ItemError(f"expected text, got half of a surrogate pair, {text[error.start]!a}") from None
        try:
            return list(self.tokenizer(text, **options)["input_ids"])
        except Exception as error:  # a tokeniser may be anybody's code
            raise ItemError(f"the tokeniser cannot read it: {_sentence(error)}") from error

    def _chat(self, messages: list[Message], tools: Any, complete: bool) -> list[int]:
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
        text = self._rendered(messages, _tools_of(tools), options)
        return self._tokens(text, add_special_tokens=False)  # the template writes special tokens itself

    def _rendered(self, messages: list[Message], tools: list[Any] | None, options: dict[str, bool]) -> str:
        """Render the chat template. ItemError if it fails, or leaves out a part of the messages or the tools."""

        def render(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
            template = self.tokenizer.get_chat_template(None, tools)
            given = {"chat_template": _STRFTIME_NOW + template} if "strftime_now" in template else {}
            return str(self.tokenizer.apply_chat_template(messages, tools, tokenize=False, **given, **options))

        spelling, text = _first_that_works(lambda spelled: render(spelled, tools), _spellings(messages))
        others = chain(_without_each(spelling, tools), _with_other_contents(spelling, tools, text))
        for what, other, other_tools in others:
            try:
                left_out = render(other, other_tools) == text
            except Exception:  # the template needs the part that was removed
                left_out = False
            if left_out:
                raise ItemError(f"expected a chat template that writes {what}, got one that leaves it out")
        return text


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
    render: Callable[[list[dict[str, Any]]], str], spellings: Iterator[list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], str]:
    first: Exception | None = None
    for spelling in spellings:
        try:
            return spelling, render(spelling)
        except Exception as error:  # a template may raise anything
            first = first or error
    assert first is not None
    raise ItemError(f"the chat template refuses it: {_sentence(first)}") from first


def _spellings(messages: list[Message]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages in the forms that chat templates expect; most templates take the first.

    The arguments of a tool call are first an object, then JSON text; a missing content is first missing, then "".
    """
    spelled = [_spelled(message) for message in messages]
    yield spelled
    called = any("tool_calls" in message for message in spelled)
    as_text = [{**m, "tool_calls": [_with_arguments(c, _dumped) for c in m["tool_calls"]]} if "tool_calls" in m else m
               for m in spelled]  # fmt: skip
    if called:
        yield as_text
    if any("content" not in message for message in spelled):
        yield [{"content": "", **message} for message in spelled]
        yield [{"content": "", **message} for message in as_text]


def _spelled(message: Message) -> dict[str, Any]:
    spelled = dict(message)
    if not spelled.get("tool_calls"):
        spelled.pop("tool_calls", None)
    else:
        spelled["tool_calls"] = [_with_arguments(call, _loaded) for call in spelled["tool_calls"]]
    reasoning = next((spelled[key] for key in REASONING if spelled.get(key)), None)
    return spelled if reasoning is None else {"reasoning_content": reasoning, "thinking": reasoning, **spelled}


def _with_arguments(call: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    changed = dict(call)
    if isinstance(call.get("function"), Mapping):
        changed["function"] = _with_arguments(call["function"], change)
    if "arguments" in call:
        changed["arguments"] = change(call["arguments"])
    return changed


def _loaded(arguments: Any) -> Any:
    try:
        found = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _emptied(arguments: Any) -> Any:
    return type(arguments)() if isinstance(arguments, (dict, str)) else arguments


def _dumped(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _without_each(
    messages: list[dict[str, Any]], tools: list[Any] | None
) -> Iterator[tuple[str, list[dict[str, Any]], list[Any] | None]]:
    """Yield (name, messages, tools) without one part, for each part that a template may leave out silently."""
    if tools:
        yield "tools", messages, None
    if any("tool_calls" in message for message in messages):
        yield "tool calls", [{"content": "", **_leave_out(message, "tool_calls")} for message in messages], tools
    if any(len(message.get("tool_calls", ())) > 1 for message in messages):  # some templates read the first call alone
        first_calls = [{**m, "tool_calls": m["tool_calls"][:1]} if m.get("tool_calls") else m for m in messages]
        yield "every tool call of a message", first_calls, tools
    bare = [{**m, "tool_calls": [_with_arguments(c, _emptied) for c in m["tool_calls"]]} if "tool_calls" in m else m
            for m in messages]  # fmt: skip
    if bare != messages:
        yield "the arguments of tool calls", bare, tools
    if messages and any(messages[-1].get(key) for key in REASONING):  # templates drop earlier turns' on purpose
        yield "reasoning", [*messages[:-1], _leave_out(messages[-1], *REASONING)], tools


def _with_other_contents(
    messages: list[dict[str, Any]], tools: list[Any] | None, text: str
) -> Iterator[tuple[str, list[dict[str, Any]], list[Any] | None]]:
    """(name, messages, tools) with a longer content of each message whose content is not in `text` as it is.

    Templates may drop what an earlier turn says beside its tool calls, on purpose.
    """
    for place, message in enumerate(messages):
        content = message.get("content", "").strip()
        earlier_call = message.get("tool_calls") and place < len(messages) - 1
        if content and content not in text and not earlier_call:
            changed = {**message, "content": f"{message['content']} x"}
            name = f"the content of message {place + 1} ({message['role']})"
            yield name, [*messages[:place], changed, *messages[place + 1 :]], tools


def _leave_out(message: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def _sentence(error: Exception) -> str:
    return shorten(str(error), 200) or type(error).__name__
