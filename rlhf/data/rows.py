"""Turn one row of preference data into pairs, a prompt, or items to score. `load_pairs` lists the formats of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from ...engine.spellings import REASONING
from .columns import (
    ARRAY,
    PROMPT_COLUMNS,
    Messages,
    Prompt,
    PromptColumns,
    RowError,
    Text,
    first,
    object_of_row,
    prompt_columns,
    refuse_lost,
    text_of,
    unread_columns,
)

__all__ = ["ARRAY", "Prompt", "RowError", "Text", "items_of_row", "object_of_row", "pairs_of_row", "prompt_of_row",
           "unread_of_items", "unread_of_pairs", "unread_of_prompt"]  # fmt: skip

SIDES = ("chosen", "rejected")
_RESPONSES = ("responses", "completions")
_RESPONSE = ("response", "content", "text", "completion")
_SCORE = ("score", "fine-grained_score", "overall_score", "rating")  # UltraFeedback's overall_score has known errors
_MARGIN = ("margin", "strength")
_SCORE_CHOSEN = ("score_chosen", "chosen_score")
_SCORE_REJECTED = ("score_rejected", "rejected_score")


def pairs_of_row(row: Any, min_score_gap: float) -> tuple[list[dict[str, Any]], int]:
    """Return (the fields of each pair, number of pairs whose score gap is too small). Raises RowError."""
    row = object_of_row(row)
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise RowError(f"source: expected a string, got {type(source).__name__}")
    if _is_pair(row):
        fields = _given_pair(row)
        gap = None
        if fields["chosen_score"] is not None and fields["rejected_score"] is not None:
            gap = fields["chosen_score"] - fields["rejected_score"]
        if gap is not None and gap < min_score_gap:
            return [], 1
        return [{**fields, "source": source}], 0
    if first(row, _RESPONSES) is not None:
        pairs, below = _scored_pairs(row, min_score_gap)
        return [{**fields, "source": source} for fields in pairs], below
    for name in SIDES if row.keys() >= set(SIDES) else ():
        if row[name] is None:
            raise RowError(f"expected chosen and rejected, but {name} is null")
    found = ", ".join(map(str, row)) or "none"
    raise RowError(f"expected the fields chosen and rejected, or prompt and responses with scores, got {found}")


def prompt_of_row(row: Any) -> Prompt:
    """Return the prompt in a row's columns, or the one that its chosen and rejected share. Raises RowError."""
    row = object_of_row(row)
    columns = prompt_columns(row)
    if columns.text is not None:
        return columns.prompt(columns.text)
    if _is_pair(row):
        shared: Prompt = _given_pair(row)["prompt"]
        return shared
    null = next((name for name in PROMPT_COLUMNS if name in row), None)
    if null is not None and row[null] is None:
        raise RowError(f"{null}: expected a text or a list of messages, got null")
    raise RowError(f"expected the field prompt, got {', '.join(map(str, row)) or 'none'}")


def items_of_row(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row's items for `Scorer`: one, or the chosen and the rejected of a pair. Raises RowError."""
    if _is_pair(row):
        fields = _given_pair(row)
        return [{"prompt": fields["prompt"], "response": fields[side]} for side in SIDES]
    columns = prompt_columns(row)
    options = {"complete": row["complete"]} if "complete" in row else {}
    if row.get("messages") is not None:
        messages = row["messages"]
        if messages != []:  # the encoder refuses an empty list with an error of its own
            messages = text_of(messages, "messages")
        if isinstance(messages, str):
            raise RowError("messages: expected messages (role, content), got str")
        refuse_lost(row, messages)
        prompt = columns.prompt(messages)
        return [{**(prompt if isinstance(prompt, dict) else {"messages": prompt}), **options}]
    if columns.text is None or row.get("response") is None:
        found = ", ".join(row) or "none"
        raise RowError(f"expected the fields prompt and response, messages, or chosen and rejected, got {found}")
    response = text_of(row["response"], "response")
    return [{"prompt": columns.prompt(columns.text), "response": response, **options}]


def unread_of_pairs(row: Mapping[str, Any]) -> list[str]:
    """Return the columns that look like content and that no pair of the row contains."""
    return unread_columns(row, (*PROMPT_COLUMNS, *(SIDES if _is_pair(row) else _RESPONSES)))


def unread_of_prompt(row: Mapping[str, Any]) -> list[str]:
    """Return the columns that look like content and that are neither in the row's prompt nor a response to it."""
    responses = (*SIDES, *_RESPONSES, *_RESPONSE)
    known = PROMPT_COLUMNS if prompt_columns(row).text is not None else (*PROMPT_COLUMNS, *SIDES)
    return unread_columns(row, known, responses)


def unread_of_items(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of the row that look like content and that `prudent score` does not read."""
    read = SIDES if _is_pair(row) else ("messages",) if row.get("messages") is not None else ("response",)
    return unread_columns(row, (*PROMPT_COLUMNS, *read))


def _is_pair(row: Mapping[str, Any]) -> bool:
    return all(row.get(side) is not None for side in SIDES)


def _given_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = (text_of(row[side], side) for side in SIDES)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("expected chosen and rejected both as texts or both as messages, got one of each")
    columns = prompt_columns(row)
    text = columns.text
    if isinstance(chosen, str) and isinstance(rejected, str):
        if text is None:
            text, chosen, rejected = split_texts(chosen, rejected)
    else:
        assert isinstance(chosen, list)
        assert isinstance(rejected, list)
        text, chosen, rejected = _split_messages(row, columns, chosen, rejected)
    prompt = columns.prompt(text)
    return {
        "prompt": prompt,
        "chosen": _response(prompt, chosen),
        "rejected": _response(prompt, rejected),
        "margin": _number(row, _MARGIN),
        "chosen_score": _number(row, _SCORE_CHOSEN),
        "rejected_score": _number(row, _SCORE_REJECTED),
    }


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two whole texts into (prompt, chosen, rejected); prompt + response restores each text."""
    if chosen == rejected:  # the caller drops and counts it as an equal pair, whatever the prompt is
        return "", chosen, rejected
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[:length] if length is not None else min(chosen, rejected, key=len)
    turn = shared.rfind("\n\nAssistant:")
    # without a turn, cut before the last blank, so that the first word that differs is not split
    end = turn + len("\n\nAssistant:") if turn >= 0 else max(shared.rfind(blank) for blank in " \n\t")
    if end <= 0:
        raise RowError("expected a prompt, or chosen and rejected that begin with the same prompt, got neither")
    return shared[:end], chosen[end:], rejected[end:]


def _split_messages(
    row: Mapping[str, Any], columns: PromptColumns, chosen: Messages, rejected: Messages
) -> tuple[Text, Messages, Messages]:
    prompt = columns.text
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    if chosen == rejected:
        shared = max(shared - 1, 0)  # the caller counts it as an equal pair
    if prompt is None or (isinstance(prompt, str) and shared):
        # a text prompt beside whole conversations (ultrafeedback_binarized) repeats their first messages
        prompt = chosen[:shared]
        if not prompt:
            raise RowError("expected a prompt, or chosen and rejected that begin with the same messages, got neither")
        refuse_lost(row, prompt)
    elif isinstance(prompt, str):
        prompt, shared = [{"role": "user", "content": prompt}], 0
    else:
        shared = len(prompt) if chosen[: len(prompt)] == prompt == rejected[: len(prompt)] else 0
    if len(chosen) == shared or len(rejected) == shared:
        raise RowError("expected a response after the shared messages in chosen and in rejected, got none")
    return prompt, chosen[shared:], rejected[shared:]


def _scored_pairs(row: Mapping[str, Any], min_score_gap: float) -> tuple[list[dict[str, Any]], int]:
    columns = prompt_columns(row)
    if columns.text is None:
        raise RowError(f"expected a prompt beside the responses, got {', '.join(map(str, row))}")
    prompt = columns.prompt(columns.text)
    responses = first(row, _RESPONSES)
    if not isinstance(responses, Sequence) or isinstance(responses, str):
        raise RowError(f"responses: expected a list, got {type(responses).__name__}")
    scores = row.get("scores")
    if scores is not None and (not isinstance(scores, Sequence) or len(scores) != len(responses)):
        raise RowError(f"scores: expected a list of {len(responses)} numbers, one per response")
    scored = []
    for i, response in enumerate(responses):
        text = _scored_response(response, i)
        score = _number(response if scores is None else {"score": scores[i]}, _SCORE)
        if score is None:
            raise RowError(f"responses: expected a score with each response, got none at index {i}")
        scored.append((_response(prompt, text), score))
    pairs, below = [], 0
    for (better, high), (worse, low) in permutations(scored, 2):
        if high - low >= min_score_gap:
            pairs.append(
                {"prompt": prompt, "chosen": better, "rejected": worse, "chosen_score": high, "rejected_score": low}
            )
        elif high > low:
            below += 1
    return pairs, below


def _scored_response(response: Any, i: int) -> Text:
    """Return the text of a scored response: the response itself, one of its fields, or a message made of its keys."""
    if isinstance(response, str):
        return response
    if isinstance(response, Mapping):
        text = first(response, _RESPONSE)
        if any(response.get(key) for key in ("tool_calls", *REASONING)):
            return text_of([{"role": "assistant", "content": text, **response}], f"responses[{i}]")
        if text is not None:
            return text_of(text, f"responses[{i}]")
    raise RowError(f"responses: expected texts or objects with a field response, got one without it at index {i}")


def _response(prompt: Prompt, response: Text) -> Text:
    """Return a response in the form of its prompt: an assistant's message unless the prompt is a text."""
    if isinstance(prompt, str) or "text" in prompt or not isinstance(response, str):
        return response
    return [{"role": "assistant", "content": response}]


def _number(row: Any, names: tuple[str, ...]) -> float | None:
    value = first(row, names) if isinstance(row, Mapping) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        name = next(name for name in names if row.get(name) is not None)
        raise RowError(f"{name}: expected a finite number, got {value!r}")
    return float(value)
