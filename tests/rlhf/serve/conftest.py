"""A small reward model with a trust region, and a server of it that runs in a thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel, Scorer, fit_trust
from prudent.rlhf.serve.config import ServeConfig


@pytest.fixture(scope="session")
def reward_folder(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3, aggregation="tradeoff:0.4")
    torch.nn.init.normal_(model.score.weight, std=0.3)  # else all rewards are nearly equal
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    words = [word for word in tokenizer.get_vocab() if not word.startswith("<")]
    items = [{"prompt": "my day", "response": f"{one} {other}"} for one in words[:6] for other in words[6:12]]
    model.score.set_trust(fit_trust(Scorer(model, tokenizer, progress=False).features(items), head=model.score))
    folder = tmp_path_factory.mktemp("served") / "run" / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scorer(reward_folder: Path) -> Scorer:
    """Scores directly what the server scores."""
    model = EnsembleRewardModel.from_pretrained(reward_folder)
    return Scorer(model, AutoTokenizer.from_pretrained(reward_folder), progress=False)


class Answer(NamedTuple):
    status: int
    headers: Any
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)


class Running:
    """A server, its address, and what is behind its paths (`server`)."""

    def __init__(self, server: Any, host: str, port: int) -> None:
        self.server, self.host, self.port = server, host, port

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own; `body`: bytes, or what JSON can hold."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, raw, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value; 0 if nothing was counted."""
        return float(self.server.metrics.registry.get_sample_value(f"prudent_{name}", labels) or 0)


@pytest.fixture(scope="session")
def launch(reward_folder: Path) -> Iterator[Callable[..., Running]]:
    """launch(**config) -> a running server; it ends with the session."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from prudent.rlhf.serve.app import Server, make_app
    from prudent.rlhf.serve.models import load_models
    from prudent.rlhf.serve.protocol import protocol
    from prudent.rlhf.serve.serve import _bind

    started: list[tuple[Any, threading.Thread]] = []

    def start(**given: Any) -> Running:
        config = ServeConfig(**{"model": (str(reward_folder),), "port": 0, **given})
        listening = _bind(config.host, config.port)
        server = Server(config, load_models(config), config.token)
        options: Any = {"http": protocol(config.read_timeout), "ws": "none", "log_level": "error"}
        running = uvicorn.Server(uvicorn.Config(make_app(server), **options))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        started.append((running, thread))
        return Running(server, *listening.getsockname()[:2])

    yield start
    for running, _ in started:
        running.should_exit = True
    for _, thread in started:
        thread.join(10)


@pytest.fixture(scope="session")
def running(launch: Callable[..., Running]) -> Running:
    """A server with the default limits."""
    return launch()
