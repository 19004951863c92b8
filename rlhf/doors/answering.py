"""From a request that a dialect has read to results: what every server of a scorer does, without a web framework."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...engine import Aggregation, HeadScores, Scorer
from ...engine.text import Encoded, ItemError
from ..evaluation.by_item import by_item
from .wire import DialectError


def json_of(raw: bytes) -> Any:
    """A body as JSON without NaN, infinity and numbers beyond them. Raises DialectError of status 400."""
    try:
        return json.loads(raw.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        got = f"{len(raw)} bytes that are none ({' '.join(str(error).split()):.120})"
        raise DialectError("body", "JSON", got, 400) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text}, which is too large")
    return value


def spec_of(scorer: Scorer, text: str | None) -> Aggregation:
    """The aggregation that a request asks for, the model's own by default. Raises DialectError.

    A request holds the items that a client happened to send together, so none may change another's reward.
    """
    head = scorer.model.score
    try:
        spec = head.aggregation.with_centre("none") if text is None else Aggregation.parse(text)
        if spec.centre != "none" or spec.of_batch:
            raise ValueError(
                f"aggregation: expected one that scores each item alone (centre=none, worst=row), got {str(spec)!r}"
            )
        spec.check_heads(head.num_heads)
        head.check_price(spec)
    except ValueError as error:
        expected, got = _halves(str(error).partition(": ")[2])
        raise DialectError("aggregation", expected, got) from None
    return spec


def read_items(scorer: Scorer, items: Sequence[Any]) -> list[Encoded]:
    """The items as the model reads them. Raises DialectError, which names an item by its place in the request."""
    found = []
    for index, item in enumerate(items):
        try:
            found.append(scorer.read(item, f"item {index}"))
        except ItemError as error:
            raise DialectError(f"item {index}", *_halves(error.reason)) from None
    return found


def results_of(scorer: Scorer, read: Sequence[Encoded], heads: HeadScores, spec: Aggregation) -> list[dict[str, Any]]:
    """One dict an item: `by_item`'s, whether it was truncated, and its number of tokens."""
    found = by_item(scorer.combine(heads, aggregation=spec))
    return [
        {**result, "truncated": item.truncated, "tokens": len(item.ids)}
        for item, result in zip(read, found, strict=True)
    ]


def _halves(sentence: str) -> tuple[str, str]:
    """Our errors' "expected this, got that" as (this, that)."""
    expected, _, got = sentence.rpartition(", got ")
    return (expected.replace("expected ", "", 1), got) if expected else (sentence, "something else")
