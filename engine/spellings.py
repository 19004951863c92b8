"""The forms in which chat templates expect messages, and the changes that show what a template leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # keys of a message; templates read the first two


def spellings(messages: list[Message]) -> Iterator[list[dict[str, Any]]]:
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


def without_each(
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


def with_other_contents(
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
