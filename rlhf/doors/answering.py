"""From a request that a dialect has read to results: what every server of a scorer does, without a web framework."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...engine import Aggregation, HeadScores, Scorer
from ...engine.text import Encoded, ItemError
from ..evaluation.by_item import by_item
from .wire import DialectError, check_alone, halves


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


def served_spec(scorer: Scorer, text: str | None) -> Aggregation:
    """The aggregation `text` for a server's requests, the model's own by default. ValueError if it cannot be used."""
    head = scorer.model.score
    spec = head.aggregation.with_centre("none") if text is None else Aggregation.parse(text)
    check_alone(spec)
    spec.check_heads(head.num_heads)
    head.check_price(spec)
    return spec


def spec_of(scorer: Scorer, text: str | None) -> Aggregation:
    """`served_spec` of what a request asks for. Raises DialectError."""
    try:
        return served_spec(scorer, text)
    except ValueError as error:
        raise DialectError("aggregation", *halves(str(error).partition(": ")[2])) from None


def read_items(scorer: Scorer, items: Sequence[Any]) -> list[Encoded]:
    """The items as the model reads them. Raises DialectError, which names an item by its place in the request."""
    found = []
    for index, item in enumerate(items):
        try:
            found.append(scorer.read(item, f"item {index}"))
        except ItemError as error:
            raise DialectError(f"item {index}", *halves(error.reason)) from None
    return found


def results_of(scorer: Scorer, read: Sequence[Encoded], heads: HeadScores, spec: Aggregation) -> list[dict[str, Any]]:
    """One dict an item: `by_item`'s, whether it was truncated, and its number of tokens."""
    found = by_item(scorer.combine(heads, aggregation=spec))
    return [
        {**result, "truncated": item.truncated, "tokens": len(item.ids)}
        for item, result in zip(read, found, strict=True)
    ]
