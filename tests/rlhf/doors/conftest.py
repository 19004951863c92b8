"""A small reward model that knows distances, and a server that scores with it in our own dialect."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel, Scorer, fit_trust
from prudent.rlhf.doors.dialects import DIALECTS
from prudent.rlhf.evaluation.by_item import by_item

_TEXT = "the day food hotel train film soup room people service good great happy love fine bad awful sad poor"
WORDS = _TEXT.split()


@pytest.fixture(scope="session")
def reward_folder(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three heads on the tiny Llama, far enough from each other to tell random responses apart, and a trust region."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("reward")
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3, aggregation="tradeoff:0.4")
    with torch.no_grad():
        model.score.weight *= 20
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    texts = [{"prompt": f"{a} {b}", "response": f"{b} {c}"} for a in WORDS for b in WORDS for c in WORDS[:3]]
    features = Scorer(model, tokenizer, progress=False).features(texts)
    model.score.set_trust(fit_trust(features, head=model.score))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scorer(reward_folder: Path) -> Scorer:
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    return Scorer(EnsembleRewardModel.from_pretrained(reward_folder), tokenizer, progress=False)


@pytest.fixture
def server(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server that answers every dialect with the scorer's numbers."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("PRUDENT_TOKEN", raising=False)
    dialects = {dialect.path: dialect for dialect in DIALECTS}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            url = urlsplit(self.path)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = dialects[url.path].read(body, dict(parse_qsl(url.query)))
            with lock:
                read = scorer.read_all(asked.items)
                scores = by_item(scorer.score(read, aggregation=asked.aggregation))
            results = [{**row, "truncated": item.truncated} for row, item in zip(scores, read, strict=True)]
            raw = json.dumps(asked.reply(results), allow_nan=False).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
