"""The client: what it asks in each form, how it reads the answer, and that nothing wrong becomes a reward."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prudent.rlhf.doors import http
from prudent.rlhf.doors.client import RewardClient

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SCORE = {"reward": 0.5, "nominal": 0.75, "worst": 0.25, "mean": [0.25, 0.75], "std": [1.0, 2.0], "distance": 1.5}
VECTOR = [0.25, 0.75, 1.0, 2.0, 1.5, 0.5]


class _Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: Callable[[Any], Any]
    refusals: list[tuple[int, dict[str, str]]]
    seen: list[tuple[str, Any, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, body, self.headers["Authorization"]))
        code, headers = self.refusals.pop(0) if self.refusals else (200, {})
        raw = json.dumps(type(self).answer(body) if code == 200 else {"error": "no"}).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(raw))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _score(body: Any) -> Any:
    return {"scores": [{**SCORE, "reward": float(len(str(item)))} for item in body["items"]]}


def _vectors(key: str) -> Callable[[Any], Any]:
    def answer(body: Any) -> Any:
        count = len(body.get("input", [None]))
        return {"data": [{"index": index, key: [*VECTOR[:-1], float(index)]} for index in reversed(range(count))]}

    return answer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str, type[_Server]]]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("PRUDENT_TOKEN", raising=False)
    monkeypatch.setattr(http, "WAITS", (0.01, 0.01))
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Any = _score, *refusals: Any) -> tuple[str, type[_Server]]:
        fields = {"answer": staticmethod(answer), "refusals": list(refusals), "seen": []}
        handler = type("Handler", (_Server,), fields)
        running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        running.daemon_threads = True
        servers.append(running)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running.server_port}", handler

    yield start
    for running in servers:
        running.shutdown()
        running.server_close()


def test_items_are_asked_for_as_they_are_and_scored_in_their_order(serve: Any) -> None:
    url, handler = serve()
    items = ["a text", CHAT, {"prompt": "a", "response": "b", "complete": False}]
    scores = RewardClient(url, model="small", aggregation="lcb:1").score(items)
    assert [score["reward"] for score in scores] == [float(len(str(item))) for item in items]
    assert scores[0]["mean"] == SCORE["mean"]
    assert handler.seen == [("/score?model=small&aggregation=lcb%3A1", {"items": items}, None)]


def test_many_items_are_asked_for_in_several_requests(serve: Any) -> None:
    url, handler = serve()
    items = ["a" * (index % 7) for index in range(600)]
    assert [score["reward"] for score in RewardClient(url).score(items)] == [index % 7 for index in range(600)]
    assert [len(body["items"]) for _, body, _ in handler.seen] == [256, 256, 88]
    assert RewardClient(url).score([]) == []


@pytest.mark.parametrize(("form", "key"), [("classify", "probs"), ("pooling", "data")])
def test_vllms_forms_give_means_stds_distance_and_reward(serve: Any, form: str, key: str) -> None:
    url, handler = serve(_vectors(key))
    items = ["one", "two", CHAT, {"prompt": "a", "response": "b"}, {"messages": CHAT}]
    scores = RewardClient(f"{url}/{form}", model="m").score(items)
    assert [score["reward"] for score in scores] == [0, 1, 0, 0, 0]  # the answer's order is that of `index`
    assert scores[0] == {"reward": 0.0, "mean": [0.25, 0.75], "std": [1.0, 2.0], "distance": 1.5}
    assert [body for _, body, _ in handler.seen] == [
        {"input": ["one", "two"], "model": "m"},
        *[{"messages": CHAT, "model": "m"}] * 3,
    ]


def test_a_prompt_with_a_system_turn_is_one_chat(serve: Any) -> None:
    url, handler = serve(_vectors("probs"))
    RewardClient(f"{url}/classify").score([{"prompt": {"system": "s", "text": "a"}, "response": "b"}])
    assert handler.seen[0][1] == {"messages": [{"role": "system", "content": "s"}, *CHAT]}


def test_the_async_client_does_not_block_the_loop_and_keeps_the_order(serve: Any) -> None:
    url, _ = serve()
    client = RewardClient(url, connections=4)

    async def both() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*(client.score_async(["a" * size] * 300) for size in range(8)))

    answers = asyncio.run(both())
    assert [[score["reward"] for score in scores] for scores in answers] == [[float(n)] * 300 for n in range(8)]


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(
    serve: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(http.time, "sleep", slept.append)
    url, handler = serve(_score, (429, {"Retry-After": "7"}), (503, {"Retry-After": "900"}))
    with caplog.at_level(logging.WARNING, logger="prudent"):
        assert RewardClient(url).score(["a"])[0]["reward"] == 1
    assert slept == [7.0, http.LONGEST_WAIT]
    assert len(handler.seen) == 3
    assert "429 Too Many Requests" in caplog.messages[0]


def test_the_token_comes_from_the_argument_or_the_environment(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, handler = serve()
    RewardClient(url, token="secret").score(["a"])
    monkeypatch.setenv("PRUDENT_TOKEN", "other")
    RewardClient(url).score(["a"])
    assert [authorization for *_, authorization in handler.seen] == ["Bearer secret", "Bearer other"]


def test_a_pickled_client_asks_the_same_server(serve: Any) -> None:
    url, _ = serve()
    client = RewardClient(url)
    client.score(["a"])
    assert pickle.loads(pickle.dumps(client)).score(["ab"])[0]["reward"] == 2


@pytest.mark.parametrize(
    ("form", "answer", "message"),
    [
        ("", {"scores": []}, "expected scores, a list of 1 objects, got"),
        ("", [1], "expected scores, a list of 1 objects, got"),
        ("", {"scores": [{"worst": 1}]}, "expected a reward in every score, got"),
        ("/classify", {"data": [{"probs": [0.5]}]}, r"probs: expected \[means, stds, distance if measured, reward\]"),
        ("/pooling", {"data": [{"index": 0, "data": ["a"] * 3}]}, r"data: expected \[means, stds,"),
    ],
)
def test_an_answer_of_another_form_is_an_error(serve: Any, form: str, answer: Any, message: str) -> None:
    url, _ = serve(lambda body: answer)
    with pytest.raises(ValueError, match=message):
        RewardClient(url + form).score(["a"])


def test_a_refusal_is_an_error_at_once_and_a_missing_server_after_three_tries(serve: Any) -> None:
    url, handler = serve(_score, (422, {}))
    with pytest.raises(ValueError, match=r"refused the request: 422 .*error"):
        RewardClient(url).score(["a"])
    assert len(handler.seen) == 1
    with pytest.raises(ValueError, match=r"^url: http://127\.0\.0\.1:1/score: expected rewards, got none in 3 tries"):
        RewardClient("http://127.0.0.1:1").score(["a"])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "a", "response": "b", "complete": False}, r"items\[0\]: expected a complete response"),
        (None, r"items\[0\]: expected a text, messages or an object, got NoneType"),
        ({"prompt": {"messages": CHAT, "tools": [{}]}, "response": "b"}, r"items\[0\]: expected no tools"),
    ],
)
def test_what_vllms_forms_cannot_say_is_refused(item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardClient("http://127.0.0.1:1/classify").score([item])


def test_a_url_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="url: expected the path /score, /classify or /pooling, or none"):
        RewardClient("http://localhost/v1/chat")
    with pytest.raises(ValueError, match="items: expected a list of items, got str"):
        RewardClient("http://localhost").score("text")
