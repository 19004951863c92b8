"""What the OpenAPI page says of every path beside its dialect's own schemas."""

from __future__ import annotations

from typing import Any

from ..doors.dialects import Dialect

ABOUT = """Rewards of an ensemble reward model, with its heads' uncertainty and the distance from what it was taught.
Every path takes `?aggregation=`, such as lcb:1, min or trust:1, and `?model=`, the name of a served model."""

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {name: {"type": "string"} for name in ("message", "field", "expected", "got")},
        }
    },
}
_STATUS = {
    400: "The body is not JSON.",
    401: "The bearer token is missing or wrong.",
    404: "No model has this name.",
    408: "The body did not come in time.",
    413: "The body, an item, or the number of items is too large.",
    422: "A field is wrong, a text cannot be read, or a score is not finite and the dialect has no null.",
    500: "The model failed.",
    503: "The queue is full: ask again after Retry-After seconds.",
    504: "No score in time.",
}
_TEXT = {"schema": {"type": "string"}}
_OBJECT = {"schema": {"type": "object"}}
HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"description": "It can.", "content": {"application/json": _OBJECT}},
    503: {"description": "It cannot.", "content": {"application/json": _OBJECT}},
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Metrics.", "content": {"text/plain": _TEXT}},
    401: {"description": _STATUS[401], "content": {"application/json": {"schema": _ERROR}}},
}


def responses(dialect: Dialect) -> dict[int | str, dict[str, Any]]:
    """The replies of a dialect, by status."""
    errors = {**_STATUS, dialect.busy: _STATUS[503]}
    if dialect.busy != 503:
        del errors[503]
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in sorted(errors.items())
    }
    found[200] = {"description": "The rewards.", "content": {"application/json": {"schema": dialect.answer}}}
    return found


def request(dialect: Dialect) -> dict[str, Any]:
    """The query parameters and the body of a dialect."""
    names = ["aggregation", "model", *(["rendered", "value"] if dialect.name == "slime" else [])]
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in names
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": dialect.body}}},
    }
