"""Join the columns that make up a row's prompt, and find the columns that nothing reads.

    column                                              use
    tools                                               given to the chat template; a list, or a list written as JSON
    system, system_prompt, system_message               a system turn before all others; without a chat template, a text
                                                        before the prompt's
    history                                             turns before the prompt: messages, or [question, answer] pairs
    context, prompt, instruction, question, query, input    the prompt: texts, joined in this order by a blank line

A text that another of these columns contains, as lines of its own, is not repeated. One of the last six may be a list
of messages, which must then contain the texts of the others. With tools or a history, a prompt that is a text becomes
the last user turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...engine.spellings import REASONING
from ...engine.text import ItemError, messages_of

Messages: TypeAlias = list[dict[str, Any]]
Text: TypeAlias = str | Messages
Prompt: TypeAlias = str | Messages | dict[str, Any]  # the last: {"messages", "tools"} or {"system", "text"}

ARRAY = "expected JSON lines, one object per line, got an array: write each of its objects on a line of its own"
_SYSTEM = ("system", "system_prompt", "system_message")
_TEXTS = ("context", "prompt", "instruction", "question", "query", "input")
PROMPT_COLUMNS = ("tools", *_SYSTEM, "history", *_TEXTS)
# keys of a message that chat templates read
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "tool_plan", *REASONING)
# keys of a scored response: the names of its text, and the keys of a message
_RESPONSE_KEYS = ("response", "text", "completion", *_MESSAGE_KEYS)
# columns that change what a model reads, whatever their values look like
_CHANGING = {"image", "images", "audio", "audios", "video", "videos", "functions", "chat_template_kwargs"}
# scripts without blanks between words: Thai, Lao, Burmese, Khmer, kana, Han
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
# metadata columns: their texts describe a row and are not its content
_ABOUT = {
    "id", "source", "model", "category", "task", "dataset", "language", "lang", "license", "url", "date", "subset",
    "timestamp", "split", "topic", "tags", "author", "annotator", "name", "type", "key", "hash", "version",
}  # fmt: skip


class RowError(ValueError):
    """A row cannot be used; its reader adds file and line."""


@dataclass(frozen=True)
class PromptColumns:
    """The parts of a row's prompt, by column. `text` is None if no column gives a text."""

    text: Text | None
    system: str | None
    history: Messages
    tools: list[Any]

    def prompt(self, text: Text) -> Prompt:
        """Return the prompt: system turn, history and tools, then `text`. Raises RowError."""
        if not (self.system or self.history or self.tools):
            return text
        if isinstance(text, str) and self.system and not (self.history or self.tools):
            return {"system": self.system, "text": text}
        user = [{"role": "user", "content": text}] if isinstance(text, str) and text else []
        messages = [*self.history, *(user if isinstance(text, str) else text)]
        if self.system:
            if messages and messages[0]["role"] == "system":
                if messages[0].get("content") != self.system:
                    raise RowError("expected one system prompt, got a column and a message with different ones")
            else:
                messages = [{"role": "system", "content": self.system}, *messages]
        return {"messages": messages, "tools": self.tools} if self.tools else messages


def object_of_row(row: Any) -> Mapping[str, Any]:
    """Return `row` if it is an object; otherwise raise RowError."""
    if isinstance(row, RowError):
        raise row
    if isinstance(row, Mapping):
        return row
    if isinstance(row, list):
        raise RowError(ARRAY)
    raise RowError(f"expected an object with fields, got {'null' if row is None else type(row).__name__}")


def first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return the first value under `names` that is not None; Parquet and `datasets` write None for a missing field."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def text_of(value: Any, name: str) -> Text:
    """Return a text unchanged, or messages with only the keys that chat templates read. Raises RowError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        raise RowError(f"{name}: expected a text or a list of messages, got {type(value).__name__}")
    called = next((m["function_call"] for m in value if isinstance(m, Mapping) and m.get("function_call")), None)
    if called is not None:
        raise RowError(f"{name}: expected tool_calls, which chat templates read, got function_call {called!r:.60}")
    try:
        return [{key: message[key] for key in _MESSAGE_KEYS if key in message} for message in messages_of(value)]
    except ItemError as error:
        raise RowError(f"{name}: {error.reason}") from None


def prompt_columns(row: Mapping[str, Any]) -> PromptColumns:
    """Read the columns listed at the top of this file. Raises RowError for one that cannot be read or joined."""
    systems = {name: row[name] for name in _SYSTEM if row.get(name)}
    for name, value in systems.items():
        if not isinstance(value, str):
            raise RowError(f"{name}: expected a text, got {type(value).__name__}")
    if len(set(systems.values())) > 1:
        raise RowError(f"{' and '.join(systems)}: expected one system prompt, got different ones")
    history, earlier = _history(row.get("history"))
    return PromptColumns(_text(row, earlier), next(iter(systems.values()), None), history, _tools(row.get("tools")))


def refuse_lost(row: Mapping[str, Any], messages: Iterable[Mapping[str, Any]]) -> None:
    """Raise RowError for a prompt column with a text that none of the `messages` has."""
    contents = "\n".join(str(message.get("content", "")) for message in messages)
    for name in _TEXTS:
        value = row.get(name)
        if isinstance(value, str) and not _holds(contents, value):
            raise RowError(
                f"{name}: expected a text that the messages contain, got one that would be lost: {value!r:.60}"
            )


def unread_columns(row: Mapping[str, Any], read: Collection[str], known: Collection[str] = ()) -> list[str]:
    """Return the columns of `row` outside `read` and `known` that look like content and are not in the columns `read`.

    Content is a text of three words or more, also inside lists and objects, and every column of images, audio, video,
    old-style functions or chat template settings. Unread keys of messages and of scored responses count as columns.
    """
    found = []
    whole = ""
    for name, value in _candidates(row, read):
        last = name.rpartition(".")[2]
        if name in known or name in found or last in _ABOUT or last.endswith("_id"):
            continue
        if last in _CHANGING and value:
            found.append(name)
            continue
        texts = [text for text in _strings(value) if _words(text) >= 3]
        if texts:
            whole = whole or "\n".join(
                text
                for column in read
                for text in _strings(row.get(column), None if column == "tools" else _RESPONSE_KEYS)
            )
            if not all(text.strip() in whole for text in texts):
                found.append(name)
    return found


def _words(text: str) -> int:
    return max(len(text.split()), len(_UNSPACED.findall(text)) // 2)


def _candidates(row: Mapping[str, Any], read: Collection[str]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if name not in read:
            yield str(name), value
        elif isinstance(value, list) and name != "tools":
            for part in value:
                if isinstance(part, Mapping):
                    known = _MESSAGE_KEYS if "role" in part else _RESPONSE_KEYS
                    yield from ((f"{name}.{key}", inner) for key, inner in part.items() if key not in known)


def _strings(value: Any, keys: Collection[str] | None = None) -> Iterator[str]:
    """Yield the texts in `value`. keys: the keys to read of an object; None: all."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if keys is None or key in keys:
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, keys)


def _text(row: Mapping[str, Any], earlier: str) -> Text | None:
    given = {name: row[name] for name in _TEXTS if row.get(name) is not None}
    if not given:
        return None
    chats = [name for name, value in given.items() if not isinstance(value, str)]
    if len(chats) > 1:
        raise RowError(f"{' and '.join(chats)}: expected messages in one of them, got messages in both")
    if chats:
        messages = text_of(given.pop(chats[0]), chats[0])
        assert isinstance(messages, list)
        refuse_lost({**given, "context": "\n\n".join(t for t in (earlier, given.get("context", "")) if t)}, messages)
        return messages
    texts = [earlier, *given.values()] if earlier else list(given.values())
    kept: list[str] = []
    for i, text in enumerate(texts):
        others = [*kept, *texts[i + 1 :]]
        if text.strip() and not any(_holds(other, text) for other in others if other != text or other in kept):
            kept.append(text)
    # the last column keeps its trailing blanks, so that a prompt of one column is unchanged
    return "\n\n".join([*(text.rstrip() for text in kept[:-1]), kept[-1]]) if kept else texts[0]


def _holds(whole: str, part: str) -> bool:
    """Return whether `part` is in `whole` as lines of its own, or after a label ("Question: ...")."""
    part = part.strip()
    return not part or re.search(rf"(?:^|\n|: ?)[ \t]*{re.escape(part)}[ \t]*(?:\n|$)", whole) is not None


def _history(value: Any) -> tuple[Messages, str]:
    """Return (turns, text that goes before the prompt's); one of the two is empty."""
    if not value or isinstance(value, str):
        return [], value or ""
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        messages = text_of(value, "history")
        assert isinstance(messages, list)
        return messages, ""
    turns: Messages = []
    for turn in value if isinstance(value, list) else [value]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError(f"history: expected messages or [question, answer] pairs, got {turn!r:.80}")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return turns, ""


def _tools(value: Any) -> list[Any]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(f"tools: expected a list of objects, or one written as JSON, got {value!r:.80}") from None
    if not value or value in ("", {}):
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError(f"tools: expected a list of objects, got {value!r:.80}")
    return value
