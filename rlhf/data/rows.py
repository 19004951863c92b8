"""One row of somebody's preference data -> pairs. The formats are listed at `load_pairs`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, TypeAlias

Text: TypeAlias = str | list[dict[str, str]]

_PROMPT = ("prompt", "instruction", "question")
_RESPONSES = ("responses", "completions")
_RESPONSE = ("response", "content", "text", "completion")
_SCORE = ("score", "fine-grained_score", "overall_score", "rating")  # UltraFeedback's overall_score has known errors
_MARGIN = ("margin", "strength")
_SCORE_CHOSEN = ("score_chosen", "chosen_score")
_SCORE_REJECTED = ("score_rejected", "rejected_score")

ARRAY = "expected JSON lines, one object a line, got an array: write each of its objects on a line of its own"


class RowError(ValueError):
    """What is wrong with a row; the reader adds where it is."""


def object_of_row(row: Any) -> Mapping[str, Any]:
    """`row`, if it is an object. Raises RowError."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, list):
        raise RowError(ARRAY)
    raise RowError(f"expected an object with fields, got {'null' if row is None else type(row).__name__}")


def pairs_of_row(row: Any, min_score_gap: float) -> tuple[list[dict[str, Any]], int]:
    """(the fields of each pair, how many pairs had too small a score gap). Raises RowError."""
    row = object_of_row(row)
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise RowError(f"source: expected a string, got {type(source).__name__}")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        fields = _given_pair(row)
        gap = None
        if fields["chosen_score"] is not None and fields["rejected_score"] is not None:
            gap = fields["chosen_score"] - fields["rejected_score"]
        if gap is not None and gap < min_score_gap:
            return [], 1
        return [{**fields, "source": source}], 0
    if _first(row, _RESPONSES) is not None:
        pairs, below = _scored_pairs(row, min_score_gap)
        return [{**fields, "source": source} for fields in pairs], below
    for name in ("chosen", "rejected") if row.keys() >= {"chosen", "rejected"} else ():
        if row[name] is None:
            raise RowError(f"expected chosen and rejected, but {name} is null")
    found = ", ".join(map(str, row)) or "none"
    raise RowError(f"expected the fields chosen and rejected, or prompt and responses with scores, got {found}")


def prompt_of_row(row: Any) -> Text:
    """The prompt a row states, or the one that its pair of responses shares. Raises RowError."""
    row = object_of_row(row)
    given = _first(row, _PROMPT)
    if given is not None:
        return _text(given, "prompt")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        shared: Text = _given_pair(row)["prompt"]
        return shared
    null = next((name for name in _PROMPT if name in row), None)
    if null is not None:
        raise RowError(f"{null}: expected a text or a list of messages, got null")
    raise RowError(f"expected the field prompt, got {', '.join(map(str, row)) or 'none'}")


def _given_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = (_text(row[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("expected chosen and rejected both as texts or both as messages, got one of each")
    given = _first(row, _PROMPT)
    prompt: Text | None = None if given is None else _text(given, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = split_texts(chosen, rejected)
        elif not isinstance(prompt, str):
            chosen, rejected = _assistant(chosen), _assistant(rejected)
    else:
        assert isinstance(chosen, list)
        assert isinstance(rejected, list)
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected)
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "margin": _number(row, _MARGIN),
        "chosen_score": _number(row, _SCORE_CHOSEN),
        "rejected_score": _number(row, _SCORE_REJECTED),
    }


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole texts; each pair joins back to what came."""
    if chosen == rejected:  # counted and dropped as an equal pair, whatever the prompt is
        return "", chosen, rejected
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[:length] if length is not None else min(chosen, rejected, key=len)
    turn = shared.rfind("\n\nAssistant:")
    # else a word both answers begin with stays whole in one of them: cut before the last blank
    end = turn + len("\n\nAssistant:") if turn >= 0 else max(shared.rfind(blank) for blank in " \n\t")
    if end <= 0:
        raise RowError("expected a prompt, or chosen and rejected that begin with the same prompt, got neither")
    return shared[:end], chosen[end:], rejected[end:]


def _split_messages(
    prompt: Text | None, chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> tuple[Text, Text, Text]:
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    if chosen == rejected:
        shared = max(shared - 1, 0)  # an equal pair, for the caller to count
    if prompt is None or (isinstance(prompt, str) and shared):
        # a prompt given as a text beside whole conversations (ultrafeedback_binarized) repeats what they begin with
        prompt = chosen[:shared]
        if not prompt:
            raise RowError("expected a prompt, or chosen and rejected that begin with the same messages, got neither")
    elif isinstance(prompt, str):
        prompt, shared = [{"role": "user", "content": prompt}], 0
    else:
        shared = len(prompt) if chosen[: len(prompt)] == prompt == rejected[: len(prompt)] else 0
    if len(chosen) == shared or len(rejected) == shared:
        raise RowError("expected a response after the shared messages in chosen and in rejected, got none")
    return prompt, chosen[shared:], rejected[shared:]


def _scored_pairs(row: Mapping[str, Any], min_score_gap: float) -> tuple[list[dict[str, Any]], int]:
    given = _first(row, _PROMPT)
    if given is None:
        raise RowError(f"expected a prompt beside the responses, got {', '.join(map(str, row))}")
    prompt = _text(given, "prompt")
    responses = _first(row, _RESPONSES)
    if not isinstance(responses, Sequence) or isinstance(responses, str):
        raise RowError(f"responses: expected a list, got {type(responses).__name__}")
    scores = row.get("scores")
    if scores is not None and (not isinstance(scores, Sequence) or len(scores) != len(responses)):
        raise RowError(f"scores: expected a list of {len(responses)} numbers, one per response")
    scored = []
    for i, response in enumerate(responses):
        entry = {"response": response} if isinstance(response, str) else response
        if not isinstance(entry, Mapping) or _first(entry, _RESPONSE) is None:
            raise RowError(f"responses: expected texts or objects with a field response, got one without at {i}")
        text = _text(_first(entry, _RESPONSE), f"responses[{i}]")
        score = _number(entry, _SCORE) if scores is None else _number({"score": scores[i]}, _SCORE)
        if score is None:
            raise RowError(f"responses: expected a score with each response, got none at {i}")
        scored.append((_assistant(text) if isinstance(text, str) and isinstance(prompt, list) else text, score))
    pairs, below = [], 0
    for (better, high), (worse, low) in permutations(scored, 2):
        if high - low >= min_score_gap:
            pairs.append(
                {"prompt": prompt, "chosen": better, "rejected": worse, "chosen_score": high, "rejected_score": low}
            )
        elif high > low:
            below += 1
    return pairs, below


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of `names` that the row has a value for; Parquet and `datasets` write None for an absent field."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _number(row: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    value = _first(row, names)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        name = next(name for name in names if row.get(name) is not None)
        raise RowError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _text(value: Any, name: str) -> Text:
    """A text, or messages reduced to role and content."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        raise RowError(f"{name}: expected a text or a list of messages, got {type(value).__name__}")
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(f"{name}: expected messages with a role and a content that are texts, got {message!r:.80}")
        messages.append({"role": role, "content": content})
    return messages
