"""What the page at `/` asks: responses to one prompt, each head's numbers, and the reward under every aggregation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...engine import Aggregation, HeadScores
from ..doors import schemas
from ..doors.wire import Asked, Dialect, DialectError, Result, needed, object_of, shown, text_of, texts_of
from .models import Served

_COMMON = ("nominal", "mean", "min", "max", "median", "tradeoff:0.4", "lcb:1", "uwo:0.5", "softmin:1", "cvar:0.5")
_PRICED = ("trust:1", "trust:3,from=1,power=1")


def read_comparison(body: Any, query: Mapping[str, str]) -> Asked:
    """{"prompt", "responses": [one or more texts]} -> each head's mean and std, the distance, and every aggregation.

    `aggregations` lists the model's own first, and has one reward a response for each; null: not finite.
    """
    body = object_of(body)
    prompt = needed(body, "prompt", "a text")
    responses = texts_of(needed(body, "responses", "a list of texts"), "responses")
    if not responses:
        raise DialectError("responses", "one text or more", shown(responses))
    model = None if body.get("model") is None else text_of(body["model"], "model")
    items = [{"prompt": text_of(prompt, "prompt"), "response": response} for response in responses]
    return Asked(items, list, model, query.get("aggregation"))


def comparison(model: Served, own: Aggregation, heads: HeadScores, results: Sequence[Result]) -> dict[str, Any]:
    """The reply to `read_comparison`."""
    priced = () if heads.distance is None else _PRICED
    names = dict.fromkeys([str(own), *_COMMON, *(f"head:{k}" for k in range(model.num_heads)), *priced])
    rewards = {name: model.scorer.combine(heads, aggregation=name).reward for name in names}
    return {
        "model": model.name,
        "responses": [{name: value for name, value in result.items() if name != "reward"} for result in results],
        "aggregations": [{"aggregation": name, "rewards": found} for name, found in rewards.items()],
    }


COMPARE = Dialect(
    "compare", "/compare", "Responses to one prompt under every aggregation; the page asks this.",
    read_comparison, schemas.COMPARE, schemas.COMPARED,
)  # fmt: skip
