"""Rewards from a server: the requests, when they are repeated, and how the answers are used."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from prudent.rlhf.doors import http
from prudent.rlhf.ppo.batch import Samples
from prudent.rlhf.ppo.rewards.server import HTTPReward
from prudent.rlhf.ppo.rewards.sources import Texts
from prudent.rlhf.sampling.prompts import Prompt


def _open(url: str, tokenizer: Any, prompts: list[Prompt], **options: Any) -> HTTPReward:
    return HTTPReward("reward.source", url, Texts(tokenizer, prompts), **options)


class _Server(BaseHTTPRequestHandler):
    answers: list[tuple[int, bytes]]
    seen: list[Any]
    paths: list[str]
    authorization: str | None

    def do_POST(self) -> None:
        self.paths.append(self.path)
        type(self).authorization = self.headers["Proxy-Authorization"]
        self.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        code, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(code)
        if body.startswith(b"CUT"):  # promises more than it sends
            self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str, type[_Server]]]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(http, "WAITS", (0.01, 0.01))
    servers: list[HTTPServer] = []

    def start(*answers: tuple[int, bytes]) -> tuple[str, type[_Server]]:
        handler = type("Handler", (_Server,), {"answers": list(answers), "seen": [], "paths": []})
        running = HTTPServer(("127.0.0.1", 0), handler)
        servers.append(running)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running.server_port}/reward", handler

    yield start
    for running in servers:
        running.shutdown()
        running.server_close()


def test_a_server_gets_texts_and_openrlhfs_query(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any
) -> None:
    url, handler = serve((200, b'{"rewards": [1, null, -2.5]}'))
    rewards = _open(url, tokenizer, prompts)(samples).reward
    assert rewards[[0, 2]].tolist() == [1, -2.5]
    assert rewards[1].isnan()
    (body,) = handler.seen
    assert body["prompts"] == ["my day", "my day", "the food was"]
    assert body["responses"] == ["good food", "bad hotel", ""]
    assert body["query"][0].split() == ["<|user|>", "my", "day", "<|end|>", "<|assistant|>", "good", "food", "<|end|>"]


def test_a_server_that_is_busy_is_asked_again(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any
) -> None:
    url, handler = serve((503, b"busy"), (200, b"CUT"), (200, b"[1, 2, 3]"))
    assert _open(url, tokenizer, prompts)(samples).reward.tolist() == [1, 2, 3]
    assert len(handler.seen) == 3


def test_every_failed_try_is_one_warning(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url, _ = serve((503, b"busy"), (200, b"CUT"), (200, b"[1, 2, 3]"))
    with caplog.at_level(logging.WARNING, logger="prudent"):
        _open(url, tokenizer, prompts)(samples)
    assert [record.getMessage() for record in caplog.records] == [
        f"reward.source: {url}: try 1 of 3: 503 Service Unavailable: 'busy'; again in 0.01 s",
        f"reward.source: {url}: try 2 of 3: IncompleteRead(3 bytes read, 97 more expected); again in 0.01 s",
    ]


def test_a_url_of_prudent_serve_or_vllm_is_asked_in_its_own_form(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any
) -> None:
    scores = [
        {"reward": r, "nominal": 2, "worst": 1, "mean": [1, 2], "std": [3, 4], "distance": 5} for r in (1, None, 3)
    ]
    url, handler = serve((200, json.dumps({"scores": scores}).encode()))
    rewards = _open(url.replace("/reward", "/score"), tokenizer, prompts)(samples)
    assert rewards.reward[[0, 2]].tolist() == [1, 3]
    assert rewards.reward[1].isnan()
    assert rewards.std is not None
    assert rewards.std.tolist() == [[3, 4]] * 3
    assert handler.seen[0]["items"][0] == {"prompt": "my day", "response": "good food"}
    vector = b'{"data": [{"index": 0, "data": [1, 2, 3, 4, 5, 6]}]}'
    url, handler = serve((200, vector))
    rewards = _open(url.replace("/reward", "/pooling"), tokenizer, prompts)(samples)
    assert rewards.reward.tolist() == [6, 6, 6]
    assert rewards.distance is not None
    assert [body["messages"][-1]["content"] for body in handler.seen] == ["good food", "bad hotel", ""]


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match=r"^reward: expected a URL without user and password") as error:
        http.check_url("reward", "http://me:secret@localhost:8000/score")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://", "it has no host"),
        ("http://:8000/x", "it has no host"),
        ("http://localhost:abc/x", "Port could not be cast to integer value as 'abc'"),
        ("http://localhost:99999/x", "Port out of range"),
        ("http://localhost:0/x", "its port is 0"),
        ("http://local host:1/x", "blanks and non-ASCII characters must be written as %XX"),
        ("http://localhost:1/größe", "blanks and non-ASCII characters must be written as %XX"),
        ("http://[::1/x", "Invalid IPv6 URL"),
        ("file:///etc/passwd", "its scheme is file"),
        ("host/score", "its scheme is missing"),
    ],
)
def test_what_is_no_url_is_refused_before_it_is_asked(
    tokenizer: Any, prompts: list[Prompt], url: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=r"^reward\.source: expected a URL as http://host:8000/path, got") as error:
        _open(url, tokenizer, prompts)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        ((404, b"what?"), r"refused the request: 404 Not Found: 'what\?'", 1),
        ((503, b"busy"), "expected rewards, got none in 3 tries, last 503", 3),
        ((200, b"CUT"), "expected rewards, got none in 3 tries, last IncompleteRead", 3),
        ((200, b"null"), "expected rewards, got None", 1),
        ((200, b'{"rewards": null}'), "expected rewards, got None", 1),
        ((200, b"<html>"), "expected JSON, got b'<html>'", 1),
        ((200, b'{"rewards": [1]}'), "expected a list of 3, one per response, got 1", 1),
    ],
)
def test_what_a_server_does_wrong_is_said(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any, answer: Any, message: str, requests: int
) -> None:
    url, handler = serve(answer)
    with pytest.raises(ValueError, match=message):
        _open(url, tokenizer, prompts)(samples)
    assert len(handler.seen) == requests


def test_a_server_that_is_not_there_or_silent_is_given_up(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any
) -> None:
    import socket

    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"got none in 3 tries, last no answer within 0.05 s"):
            _open(url, tokenizer, prompts, timeout=0.05)(samples)
    with pytest.raises(ValueError, match=r"got none in 3 tries, last .*refused"):
        _open(url, tokenizer, prompts)(samples)


def test_the_proxy_that_the_environment_names_is_used(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, handler = serve((200, b"[1, 2, 3]"))
    monkeypatch.setenv("http_proxy", proxy.removesuffix("/reward").replace("http://", "http://me:secret@"))
    assert _open("http://no.such.host/reward", tokenizer, prompts)(samples).reward.tolist() == [1, 2, 3]
    assert handler.paths == ["http://no.such.host/reward"]
    assert handler.authorization == "Basic bWU6c2VjcmV0"


def test_a_request_is_sent_again_after_1_4_and_16_seconds() -> None:
    assert http.WAITS == (1, 4, 16)
