"""Our own dialect, `/score`: texts, chats, responses or pairs in, everything that the model knows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.rows import RowError, items_of_row
from .wire import Asked, DialectError, Result, halves, is_messages, messages_of, object_of, shown, texts_of

_KINDS = ("texts", "chats", "items", "pairs")
_SIDES = ("chosen", "rejected")


def read_score(body: Any, query: Mapping[str, str]) -> Asked:
    """One of {"texts"}, {"chats"}, {"items"} or {"pairs"} -> {"scores": [...]}, in their order.

    texts   whole texts, prompt and response, as plain text
    chats   lists of messages; the last turn of role assistant is the response
    items   {"prompt", "response"} or {"messages"}, with the columns that `prudent score` reads; "complete": false for a
            response that was cut short; or any other form of `Scorer`
    pairs   {"chosen", "rejected"}, with or without a prompt

    A score is {"reward", "nominal", "worst", "mean", "std", "distance", "finite"}; that of a pair is {"chosen",
    "rejected", "margin", "preferred"}, with the reward of the chosen minus that of the rejected, and the side that has
    the higher reward (null for a tie or a reward that is not finite).
    """
    body = object_of(body)
    given = [kind for kind in _KINDS if kind in body]
    if len(given) != 1:
        raise DialectError("body", f"exactly one of {', '.join(_KINDS)}", " and ".join(given) or "none of them")
    (kind,) = given
    unknown = [key for key in body if key not in (kind, "model")]
    if unknown:
        raise DialectError(
            str(unknown[0]), f"no other key than {kind} and model (aggregation is a query parameter)", "it in the body"
        )
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise DialectError("model", "a text", shown(model))
    values = body[kind]
    if not isinstance(values, list):
        raise DialectError(kind, "a list", shown(values))
    items: list[Any]
    if kind == "texts":
        items = list(texts_of(values, kind))
    elif kind == "chats":
        items = [{"messages": messages_of(chat, f"chats[{index}]")} for index, chat in enumerate(values)]
    else:
        items = [item for index, row in enumerate(values) for item in _rows(kind, row, f"{kind}[{index}]")]
    reply = _pairs_reply if kind == "pairs" else _items_reply
    return Asked(items, reply, model, query.get("aggregation"))


def _rows(kind: str, row: Any, field: str) -> list[Any]:
    if kind == "items" and (isinstance(row, (str, list)) or _is_item(row)):
        return [{"messages": row}] if is_messages(row) else [row]
    try:
        items = items_of_row(object_of(row, field))
    except RowError as error:
        raise DialectError(field, *halves(str(error))) from None
    if (kind == "pairs") != (len(items) == 2):
        wanted = "chosen and rejected" if kind == "pairs" else "one response (a pair belongs into pairs)"
        raise DialectError(field, wanted, f"{len(items)} responses")
    return items


def _is_item(row: Any) -> bool:
    """Whether `row` is an item in a form of `Scorer` that no row of a file has."""
    return isinstance(row, Mapping) and ("rendered" in row or isinstance(row.get("prompt"), Mapping))


def _scored(result: Result) -> dict[str, Any]:
    return {**result, "finite": result["reward"] is not None}


def _items_reply(results: Sequence[Result]) -> dict[str, Any]:
    return {"scores": [_scored(result) for result in results]}


def _pairs_reply(results: Sequence[Result]) -> dict[str, Any]:
    return {"scores": [_pair(*results[start : start + 2]) for start in range(0, len(results), 2)]}


def _pair(chosen: Result, rejected: Result) -> dict[str, Any]:
    found: dict[str, Any] = dict(zip(_SIDES, (_scored(chosen), _scored(rejected)), strict=True))
    if chosen["reward"] is None or rejected["reward"] is None:
        return {**found, "margin": None, "preferred": None}
    margin = chosen["reward"] - rejected["reward"]
    return {**found, "margin": margin, "preferred": None if margin == 0 else _SIDES[margin < 0]}
