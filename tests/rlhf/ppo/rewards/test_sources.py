"""Rewards from a function, a lexicon or a server: what each is given, and what becomes of its answer."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.ppo.batch import Samples
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.rewards import sources
from prudent.rlhf.ppo.rewards.resolve import open_gold, open_reward
from prudent.rlhf.sampling.prompts import Prompt


def _config(source: str | Path, **reward: Any) -> PPOConfig:
    return PPOConfig(model="m", prompts="p", output="o", reward={"source": str(source), **reward})


def _open(source: str | Path, tokenizer: Any, prompts: list[Prompt], kind: Any, **reward: Any) -> Any:
    return open_reward(_config(source, **reward), tokenizer, prompts, "cpu", kind)


# -- functions


def _function(tmp_path: Path, body: str) -> str:
    (tmp_path / "mine.py").write_text(f"def score(prompts, responses):\n    {body}\n", "utf-8")
    return f"{tmp_path / 'mine.py'}:score"


def test_a_function_gets_prompts_and_responses(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path
) -> None:
    body = "return [len(p) + 100 * (r == 'good food') + 200 * (r == '') for p, r in zip(prompts, responses)]"
    rewards = _open(_function(tmp_path, body), tokenizer, prompts, "callable")(samples)
    assert rewards.reward.tolist() == [106.0, 6.0, 212.0]
    assert rewards[1:] == (None, None, None, None)


def test_a_module_beside_the_command_is_found(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_of_mine.py").write_text("import numpy\ndef f(p, r): return numpy.ones(len(p))", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert open_gold("reward_of_mine:f", tokenizer, prompts)(samples).reward.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", ["None", "float('nan')", "float('inf')", "10**400"])
def test_what_is_no_finite_number_is_nan(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path, value: str
) -> None:
    rewards = _open(_function(tmp_path, f"return [{value}, {value}, 2]"), tokenizer, prompts, "callable")(samples)
    assert [math.isnan(x) for x in rewards.reward.tolist()] == [True, True, False]


def test_a_mapping_may_say_what_its_heads_think(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path
) -> None:
    body = "return {'rewards': [1, 2, 3], 'worst': [0, 0, 0], 'mean': [[1, 2]] * 3, 'std': [[.1, .2]] * 3, 'x': 5}"
    rewards = _open(_function(tmp_path, body), tokenizer, prompts, "callable")(samples)
    assert (rewards.worst.tolist(), rewards.nominal, list(rewards.std.shape)) == ([0, 0, 0], None, [3, 2])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"mine.py:score: rewards: expected a list of 3, one a response, got 1"),
        ("return 1.0", "expected a list of 3, one a response, got float"),
        ("return ['a', 1, 2]", "expected numbers, None or NaN, got 'a'"),
        ("return {'score': [1, 2, 3]}", "expected rewards in the answer, got score"),
        ("return {'rewards': [1, 2, 3], 'mean': [[1], [1, 2], [1]]}", "mean: expected one list a response, all of one"),
        ("return {'rewards': [1, 2, 3], 'mean': [[], [], []]}", "mean: expected one list a response, .* none empty"),
        (
            "return {'rewards': [1, 2, 3], 'mean': [[1, 2]] * 3, 'std': [[1, 2, 3]] * 3}",
            r"mine.py:score: expected mean and std of the same heads, got 2 and 3 a response",
        ),
        ("pass", r"reward.source: .*mine.py:score: expected rewards, got None"),
        ("return {'rewards': None}", "expected rewards, got None"),
        ("raise KeyError('k')", r"reward.source: .*mine.py:score raised KeyError: 'k'"),
        ("raise SystemExit(0)", r"reward.source: .*mine.py:score raised SystemExit: 0"),
    ],
)
def test_what_a_function_does_wrong_is_said(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path, body: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _open(_function(tmp_path, body), tokenizer, prompts, "callable")(samples)


def test_a_gold_function_that_ends_the_process_is_refused_like_any_error(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path
) -> None:
    gold = open_gold(_function(tmp_path, "raise SystemExit(0)"), tokenizer, prompts)
    with pytest.raises(ValueError, match=r"^gold: .*mine.py:score raised SystemExit: 0"):
        gold(samples)
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n", "utf-8")
    with pytest.raises(ValueError, match=r"^gold: .*script.py cannot be imported: SystemExit: 0"):
        open_gold(f"{tmp_path / 'script.py'}:score", tokenizer, prompts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:f", "gold: no_such_module cannot be imported: ModuleNotFoundError"),
        ("math:no_such", "gold: expected a function no_such in math, got none"),
        ("nothing", "gold: expected MODULE:FUNCTION or FILE.py:FUNCTION, got 'nothing'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(
    tokenizer: Any, prompts: list[Prompt], source: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_gold(source, tokenizer, prompts)


def test_vader_judges_the_response_alone(tokenizer: Any, prompts: list[Prompt], samples: Samples) -> None:
    pytest.importorskip("vaderSentiment")
    gold = open_gold("vader", tokenizer, prompts)(samples).reward
    assert gold[0] > 0 > gold[1]
    assert gold[2] == 0


# -- servers


class _Server(BaseHTTPRequestHandler):
    answers: list[tuple[int, bytes]]
    seen: list[Any]

    def do_POST(self) -> None:
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
    monkeypatch.setattr(sources, "_WAITS", (0.01, 0.01))
    servers: list[HTTPServer] = []

    def start(*answers: tuple[int, bytes]) -> tuple[str, type[_Server]]:
        handler = type("Handler", (_Server,), {"answers": list(answers), "seen": []})
        server = HTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_gets_texts_and_openrlhfs_query(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any
) -> None:
    url, server = serve((200, b'{"rewards": [1, null, -2.5]}'))
    rewards = _open(url, tokenizer, prompts, "http")(samples).reward
    assert rewards[[0, 2]].tolist() == [1, -2.5]
    assert rewards[1].isnan()
    (body,) = server.seen
    assert body["prompts"] == ["my day", "my day", "the food was"]
    assert body["responses"] == ["good food", "bad hotel", ""]
    assert body["query"][0].split() == ["<|user|>", "my", "day", "<|end|>", "<|assistant|>", "good", "food", "<|end|>"]


def test_a_server_that_is_busy_is_asked_again(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any
) -> None:
    url, server = serve((503, b"busy"), (200, b"CUT"), (200, b"[1, 2, 3]"))
    assert _open(url, tokenizer, prompts, "http")(samples).reward.tolist() == [1, 2, 3]
    assert len(server.seen) == 3


def test_every_new_try_is_told(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url, _ = serve((503, b"busy"), (200, b"CUT"), (200, b"[1, 2, 3]"))
    with caplog.at_level(logging.WARNING, logger="prudent"):
        _open(url, tokenizer, prompts, "http")(samples)
    assert [record.getMessage() for record in caplog.records] == [
        f"reward.source: {url}: try 1 of 3: 503 Service Unavailable: 'busy'; again in 0.01 s",
        f"reward.source: {url}: try 2 of 3: IncompleteRead(3 bytes read, 97 more expected); again in 0.01 s",
    ]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://", "no host is given"),
        ("http://:8000/x", "no host is given"),
        ("http://localhost:abc/x", "Port could not be cast to integer value as 'abc'"),
        ("http://localhost:99999/x", "Port out of range"),
        ("http://localhost:0/x", "there is no port 0"),
        ("http://local host:1/x", "blanks and what is not ASCII are written %XX"),
        ("http://localhost:1/größe", "blanks and what is not ASCII are written %XX"),
        ("http://[::1/x", "Invalid IPv6 URL"),
        ("file:///etc/passwd", "its scheme is file"),
        ("host/score", "its scheme is missing"),
    ],
)
def test_what_is_no_url_is_refused_before_it_is_asked(
    tokenizer: Any, prompts: list[Prompt], url: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=r"^reward\.source: expected a URL as http://host:8000/path, got") as error:
        _open(url, tokenizer, prompts, "http")
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
        ((200, b'{"rewards": [1]}'), "expected a list of 3, one a response, got 1", 1),
    ],
)
def test_what_a_server_does_wrong_is_said(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any, answer: Any, message: str, requests: int
) -> None:
    url, server = serve(answer)
    with pytest.raises(ValueError, match=message):
        _open(url, tokenizer, prompts, "http")(samples)
    assert len(server.seen) == requests


def test_a_server_that_is_not_there_or_silent_is_given_up(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, serve: Any
) -> None:
    import socket

    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"got none in 3 tries, last no answer within 0.05 s"):
            _open(url, tokenizer, prompts, "http", timeout=0.05)(samples)
    with pytest.raises(ValueError, match=r"got none in 3 tries, last .*refused"):
        _open(url, tokenizer, prompts, "http")(samples)
