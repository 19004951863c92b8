"""vLLM's `/classify` and `/pooling` and OpenAI's `/v1/embeddings`, with an item's scores as one vector.

The vector is [mean of K heads, std of K heads, distance if the model measures it, reward]: verl reads the last number.
An odd length has no distance, so `scores_of_vector` can take it apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .wire import Asked, DialectError, Result, messages_of, needed, object_of, shown, text_of


def vector_of(result: Result, field: str) -> list[float]:
    """[means, stds, distance, reward]. Raises DialectError if one is not finite: the vectors have no null."""
    distance = [result["distance"]] if "distance" in result else []
    numbers = [*result["mean"], *result["std"], *distance, result["reward"]]
    if any(number is None for number in numbers):
        raise DialectError(field, "finite scores", "a score that is not finite")
    return numbers


def scores_of_vector(vector: Any, field: str) -> dict[str, Any]:
    """{"reward", "mean", "std", "distance"} of a vector; no distance if its length is odd. Raises DialectError."""
    numbers = isinstance(vector, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in vector)
    if not numbers or len(vector) < 3:
        raise DialectError(field, "[means, stds, distance if measured, reward], 3 numbers or more", shown(vector))
    heads = (len(vector) - 1) // 2
    found = {"reward": vector[-1], "mean": vector[:heads], "std": vector[heads : 2 * heads]}
    return found if len(vector) % 2 else {**found, "distance": vector[-2]}


def read_classify(body: Any, query: Mapping[str, str]) -> Asked:
    """vLLM's classification, {"model", "input"} or {"model", "messages"} -> data[i].probs, the reward last.

    A text of `input` was written by the reward model's chat template, as verl does it, or is a plain text for a model
    without one. Token ids are used unchanged; messages are rendered here. `use_activation`, `user` and the like of
    vLLM change nothing.
    """

    def entry(index: int, vector: list[float]) -> dict[str, Any]:
        return {"index": index, "label": None, "probs": vector, "num_classes": len(vector)}

    return _read(body, query, entry)


def read_pooling(body: Any, query: Mapping[str, str]) -> Asked:
    """vLLM's pooling, the body of `read_classify` -> data[i].data, the reward last."""

    def entry(index: int, vector: list[float]) -> dict[str, Any]:
        return {"index": index, "object": "pooling", "data": vector}

    return _read(body, query, entry)


def read_embeddings(body: Any, query: Mapping[str, str]) -> Asked:
    """OpenAI's embeddings as SGLang answers for a reward model, the body of `read_classify` -> data[i].embedding."""

    def entry(index: int, vector: list[float]) -> dict[str, Any]:
        return {"index": index, "object": "embedding", "embedding": vector}

    return _read(body, query, entry)


def _read(body: Any, query: Mapping[str, str], entry: Callable[[int, list[float]], dict[str, Any]]) -> Asked:
    body = object_of(body)
    model = body.get("model")
    if model is not None:
        text_of(model, "model")
    encoding = body.get("encoding_format", "float")
    if encoding != "float":
        raise DialectError("encoding_format", '"float"', shown(encoding))
    if "messages" in body:
        items: list[Any] = [{"messages": messages_of(body["messages"], "messages")}]
    else:
        items = _inputs(needed(body, "input", "a text, token ids, or a list of them; or the key messages"))

    def reply(results: Sequence[Result]) -> dict[str, Any]:
        data = [entry(i, vector_of(result, f"data[{i}]")) for i, result in enumerate(results)]
        tokens = sum(int(result.get("tokens", 0)) for result in results)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        return {"id": "score", "object": "list", "created": 0, "model": model or "", "data": data, "usage": usage}

    return Asked(items, reply, model, query.get("aggregation"))


def _inputs(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [{"rendered": given}]
    if _ids(given):
        return [given]
    if not isinstance(given, list) or not given:
        raise DialectError("input", "a text, token ids, or a list of them", shown(given))
    for index, one in enumerate(given):
        if not isinstance(one, str) and not _ids(one):
            raise DialectError(f"input[{index}]", "a text or token ids", shown(one))
    return [{"rendered": one} if isinstance(one, str) else one for one in given]


def _ids(value: Any) -> bool:
    numbers = isinstance(value, list) and bool(value)
    return numbers and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
