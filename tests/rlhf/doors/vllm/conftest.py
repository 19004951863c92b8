"""One vLLM server for the whole run, of a small random Llama with heads and a trust region, and what `Scorer` says.

Its heads read what those of `prudent train` read by default: the last state, a mean over the response and its
log-probability. `test_families.py` has models that read the last state alone.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prudent import EnsembleRewardModel, Scorer, fit_trust
from prudent.engine.likelihood import special_ids
from prudent.engine.trust import blocks_of_taps

STARTS_WITHIN = 600.0  # seconds: an engine takes half a minute on an idle machine, minutes on a busy one


@pytest.fixture(scope="session")
def reward_folder(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's attention for CPUs has no head dimension 8, as `tiny_chat_folder`'s model has; this one has 32."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = EnsembleRewardModel.from_trunk(
        LlamaForCausalLM(config).eval(),
        num_heads=3,
        taps=["last:-1", "mean:2/3", "logprob"],
        logprob_skips=special_ids(tokenizer),
    )
    torch.nn.init.normal_(model.score.weight, std=0.1)
    words = [word for word in tokenizer.get_vocab() if not word.startswith("<")]
    items = [{"prompt": "my day", "response": f"{one} {other}"} for one in words[:6] for other in words[6:12]]
    features = Scorer(model, tokenizer, progress=False).features(items)
    # drawn towards the mean, so that the distance does not multiply the trunk's rounding
    region = fit_trust(
        features, head=model.score, shrinkage=0.5, blocks=blocks_of_taps(model.config.taps, features.shape[1])
    )
    model.score.set_trust(region)
    folder = tmp_path_factory.mktemp("served") / "run" / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scorer(reward_folder: Path) -> Scorer:
    """Scores directly what the server scores."""
    model = EnsembleRewardModel.from_pretrained(reward_folder)
    return Scorer(model, AutoTokenizer.from_pretrained(reward_folder), progress=False)


class Server:
    """A running server. It takes requests from any number of threads."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, raw, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    def post(self, path: str, body: Any) -> Any:
        """The JSON of an answer with status 200."""
        status, raw = self.ask("POST", path, body)
        assert status == 200, raw
        return json.loads(raw)

    def metric(self, name: str) -> float:
        """One of vLLM's Prometheus metrics."""
        page = self.ask("GET", "/metrics")[1].decode()
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"vllm:{name}{{"))

    def hits(self) -> float:
        """Tokens that were taken from the prefix cache so far."""
        return self.metric("prefix_cache_hits_total")


@pytest.fixture(scope="session")
def server(reward_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve FOLDER`, as docs/vllm.md says, in fp32 on the CPU."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: `make doors-vllm` makes an environment with it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(reward_folder)),
        *("--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32"),
        *("--block-size", "32"),  # tokens of the prefix cache; 128 on a CPU by default, as many as this model takes
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    settings = {
        "VLLM_PLUGINS": "prudent",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    running, deadline = Server(port), time.monotonic() + STARTS_WITHIN
    try:
        while not _healthy(running):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(1)
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(server: Server) -> bool:
    try:
        return server.ask("GET", "/health")[0] == 200
    except OSError:
        return False
