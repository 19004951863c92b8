"""`trace_reward`: a trace of verifiers to the scorer's reward, its uncertainty among the trace's metrics."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from prudent.rlhf.doors.verifiers import trace_reward

INSTALLED = importlib.util.find_spec("verifiers") is not None


class Trace:
    """A trace of verifiers 0.4, as far as the door reads and writes it."""

    def __init__(self, answer: str, is_truncated: bool = False, question: Any = "the day") -> None:
        self.messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        self.is_truncated = is_truncated
        self.metrics: dict[str, float] = {}

    def record_metric(self, name: str, value: float) -> None:
        self.metrics[name] = float(value)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """verifiers' `message_to_wire`, which makes OpenAI's form of a message; here messages have it already."""
    name = "verifiers.v1.dialects.chat"
    for end in range(1, 5):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:end]), ModuleType(name))
    sys.modules[name].message_to_wire = dict  # type: ignore[attr-defined]


@pytest.mark.usefixtures("wire")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "server"])
def test_the_reward_is_the_scorers_and_the_trace_has_the_uncertainty(remote, cut, reward_folder, server, scorer):
    judge = trace_reward(server if remote else reward_folder, aggregation="lcb:1", name="rm")
    trace = Trace("is good", is_truncated=cut)
    found = asyncio.run(judge(trace))
    item = {"prompt": "the day", "response": "is good", "complete": not cut}
    scores = scorer.score([item], aggregation="lcb:1")
    assert found == pytest.approx(scores.reward[0], abs=1e-5)
    assert set(trace.metrics) == {"rm_std", "rm_gap", "rm_distance", "rm_truncated"}
    assert trace.metrics["rm_std"] == pytest.approx(scores.std.mean().item(), rel=1e-5)
    assert trace.metrics["rm_truncated"] == float(cut)


@pytest.mark.usefixtures("wire")
def test_a_content_in_parts_is_joined_and_an_image_is_refused(reward_folder, scorer):
    judge = trace_reward(reward_folder)
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "day"}]
    found = asyncio.run(judge(Trace("is good", question=parts)))
    want = scorer.score([{"prompt": "the day", "response": "is good"}]).reward[0]
    assert found == pytest.approx(want, abs=1e-5)
    with pytest.raises(ValueError, match="expected text, got a part of type image_url"):
        asyncio.run(judge(Trace("is good", question=[{"type": "image_url"}])))


@pytest.mark.doors
@pytest.mark.skipif(not INSTALLED, reason="verifiers is not installed: make doors")
def test_a_trace_of_verifiers_itself_gets_the_scorers_reward(reward_folder, scorer):
    from verifiers.v1.trace import MessageNode, Trace
    from verifiers.v1.types import AssistantMessage, UserMessage

    nodes = [
        MessageNode(message=UserMessage(content="the day"), parent=None),
        MessageNode(message=AssistantMessage(content="is good"), parent=0, sampled=True),
    ]
    for stop in (None, "max_output_tokens"):
        trace = Trace.model_construct(nodes=nodes, calls=[], metrics={}, stop_condition=stop)
        found = asyncio.run(trace_reward(reward_folder)(trace))
        want = scorer.score([{"prompt": "the day", "response": "is good", "complete": stop is None}])
        assert found == pytest.approx(want.reward[0], abs=1e-5)
        assert trace.metrics["prudent_std"] == pytest.approx(want.std.mean().item(), rel=1e-5)
        assert trace.metrics["prudent_truncated"] == float(stop is not None)


@pytest.mark.skipif(INSTALLED, reason="verifiers is installed")
def test_without_verifiers_the_error_names_it(reward_folder):
    with pytest.raises(ImportError, match="pip install verifiers"):
        trace_reward(reward_folder)
