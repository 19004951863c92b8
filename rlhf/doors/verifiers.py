"""A reward for verifiers and prime-rl: the model's answer to a trace, with its uncertainty among the trace's metrics.

from prudent.rlhf.doors.verifiers import trace_reward
judge = trace_reward("http://host:8000", aggregation="lcb:1")

class MyTask(vf.Task[MyData]):
    @vf.reward(weight=1.0)
    async def prudent(self, trace: vf.Trace) -> float:
        return await judge(trace)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ...engine import Aggregation
from .backend import Source, open_backend
from .uncertainty import columns_of


def trace_reward(
    model_or_url: Source,
    *,
    aggregation: str | Aggregation | None = None,
    trust: float | None = None,
    name: str = "prudent",
    batch_tokens: int = 4096,
    timeout: float = 60.0,
) -> Callable[[Any], Awaitable[float]]:
    """judge(trace) -> the reward of the trace's last branch, whose last assistant's message is the response.

    It records NAME_std, NAME_gap, NAME_distance (those that the model measures) and NAME_truncated as metrics of the
    trace, and scores a trace that verifiers calls truncated as a response that was cut off. A trace without a finite
    reward is a ValueError, which verifiers records as the trace's error.

    Args:
        model_or_url, aggregation, trust, batch_tokens, timeout: as in `trl_reward`.
        name: what the metrics begin with.
    """
    try:
        from verifiers.v1.dialects.chat import message_to_wire
    except ImportError as error:
        raise ImportError(
            f"the reward is for verifiers 0.4, which cannot be imported ({error}): pip install verifiers"
        ) from error
    backend = open_backend(model_or_url, aggregation, trust, batch_tokens=batch_tokens, timeout=timeout)

    async def judge(trace: Any) -> float:
        messages = [_plain(message_to_wire(message)) for message in trace.messages]
        cut = bool(trace.is_truncated)
        (scored,) = await backend.score_async([{"messages": messages, "complete": not cut}])
        if scored["reward"] is None:
            raise ValueError("prudent: expected a finite reward, got one that is not")
        for column, (value,) in columns_of([scored]).items():
            if value is not None:
                trace.record_metric(f"{name}_{column}", value)
        trace.record_metric(f"{name}_truncated", float(cut))
        return float(scored["reward"])

    return judge


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a text: the parts of a content in parts, joined. ValueError for an image."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    others = [part.get("type") for part in content if part.get("type") != "text"]
    if others:
        raise ValueError(f"messages: expected text, got a part of type {others[0]}")
    return {**message, "content": "".join(part["text"] for part in content)}
