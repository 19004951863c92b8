"""What every wire dialect is made of: a request that was read, errors that name a field, and an item's numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ...kernels import Aggregation

Result: TypeAlias = Mapping[str, Any]
"""An item's scores: reward, nominal, worst (float or None), mean, std (K floats or None each), distance (float or None;
absent without a trust region). None stands for a number that is not finite. It may have `truncated`."""

# ends of a response that a policy's tokeniser writes when special tokens are kept: <|im_end|>, <|eot_id|>, <|end|>,
# DeepSeek's full-width bars, </s>, <eos>, <end_of_turn>
_ENDS = re.compile(r"(?:<[|\uff5c][^<>|\uff5c]{1,40}[|\uff5c]>|</s>|<eos>|<end_of_turn>)\s*$")


class DialectError(ValueError):
    """A body, parameter or result that a dialect cannot hold: the `field`, what was `expected`, what came (`got`).

    status: the HTTP status that says it, 422 unless another fits better.
    """

    def __init__(self, field: str, expected: str, got: str, status: int = 422) -> None:
        super().__init__(f"{field}: expected {expected}, got {got}")
        self.field, self.expected, self.got, self.status = field, expected, got, status


@dataclass(frozen=True)
class Asked:
    """A request that a dialect has read.

    items        what to score, in `Scorer`'s forms; may be empty
    reply        their results, in the items' order -> the reply, which JSON can hold without NaN
    model        the name of the model that the body asks for; None: the default
    aggregation  how the heads become one reward; None: the model's own
    """

    items: list[Any]
    reply: Callable[[Sequence[Result]], Any]
    model: str | None = None
    aggregation: str | None = None


class Dialect(NamedTuple):
    """One way to ask for rewards over HTTP.

    name     for logs and metrics
    path     where it is mounted
    summary  one sentence
    read     (parsed JSON body, query parameters) -> Asked; raises DialectError
    body     JSON schema of the body
    answer   JSON schema of the reply
    busy     status for "ask again later": 429, or 503 for a client that does not repeat a request after any 4xx
    """

    name: str
    path: str
    summary: str
    read: Callable[[Any, Mapping[str, str]], Asked]
    body: Mapping[str, Any]
    answer: Mapping[str, Any]
    busy: int = 429


def shown(value: Any) -> str:
    """A value in an error message: its type, or a short value itself."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(ascii, list(value)[:8])) or 'no keys'}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def halves(sentence: str) -> tuple[str, str]:
    """Our errors' "expected this, got that" as (this, that)."""
    expected, _, got = sentence.rpartition(", got ")
    return (expected.replace("expected ", "", 1), got) if expected else (sentence, "something else")


def check_alone(spec: Aggregation) -> None:
    """Raise ValueError for an aggregation that makes an item's reward depend on the other items of a request, which are
    those that a client happened to send together.
    """
    if spec.centre != "none" or spec.of_batch:
        raise ValueError(
            f"aggregation: expected one that scores each item alone (centre=none, worst=row), got {str(spec)!r}"
        )


def object_of(body: Any, field: str = "body") -> Mapping[str, Any]:
    """`body` if it is a JSON object. Raises DialectError."""
    if not isinstance(body, Mapping):
        raise DialectError(field, "a JSON object", shown(body))
    return body


def needed(body: Mapping[str, Any], key: str, expected: str) -> Any:
    """`body[key]`. Raises DialectError if it is missing."""
    if key not in body:
        raise DialectError(key, expected, "nothing")
    return body[key]


def text_of(value: Any, field: str) -> str:
    """`value` if it is a text. Raises DialectError."""
    if not isinstance(value, str):
        raise DialectError(field, "a text", shown(value))
    return value


def texts_of(value: Any, field: str) -> list[str]:
    """`value` if it is a list of texts; one text is a list of one. Raises DialectError."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise DialectError(field, "a list of texts", shown(value))
    return [text_of(one, f"{field}[{index}]") for index, one in enumerate(value)]


def messages_of(value: Any, field: str) -> list[dict[str, Any]]:
    """`value` if it is a list of messages (role, content), at least one. Raises DialectError."""
    if not isinstance(value, list) or not value:
        raise DialectError(field, "a list of messages (role, content)", shown(value))
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DialectError(f"{field}[{index}]", "a message with a role and a content", shown(message))
    return [dict(message) for message in value]


def is_messages(value: Any) -> bool:
    """Whether `value` looks like a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def without_end(response: str) -> tuple[str, bool]:
    """(a response without the special tokens that close it, whether there were any)."""
    shorter = _ENDS.sub("", response)
    if shorter == response:
        return response, False
    return without_end(shorter)[0], True


def flag(query: Mapping[str, str], name: str, default: bool) -> bool:
    """A query parameter that is true or false. Raises DialectError."""
    value = query.get(name)
    if value is None:
        return default
    if value not in ("true", "false", "1", "0"):
        raise DialectError(name, "true or false", shown(value))
    return value in ("true", "1")


def uncertainty(result: Result) -> dict[str, float | None]:
    """The scalars that a trainer logs beside the reward.

    std       mean of the heads' stds
    gap       nominal - worst: what pessimism costs
    distance  from the reference responses, 1 = their 95 % quantile; only if the model measures it
    """
    found: dict[str, float | None] = {"std": mean_std(result), "gap": _difference(result["nominal"], result["worst"])}
    if "distance" in result:
        found["distance"] = result["distance"]
    return found


def mean_std(result: Result) -> float | None:
    """The mean of an item's stds; None if one is not finite."""
    stds = result["std"]
    return None if any(std is None for std in stds) else math.fsum(stds) / len(stds)


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def unwrapped(values: list[Any]) -> Any:
    """A list of one as its element: clients that ask for one text put the answer into a tensor of one."""
    return values[0] if len(values) == 1 else values
