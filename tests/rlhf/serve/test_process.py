"""The command `prudent serve` as a process: it starts, drains on SIGTERM, and its OpenAPI page is true."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.doors import http
from prudent.rlhf.doors.client import RewardClient
from prudent.rlhf.serve.config import ServeConfig
from prudent.rlhf.serve.serve import run_serve

from .conftest import Running

ITEM = {"prompt": "my day", "response": "good food"}
Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start(reward_folder: Path) -> Iterator[Start]:
    """start(*flags) -> (the process, its address once it listens)."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    processes = []

    def start(*flags: str, port: int = 0) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "prudent.cli", "serve", "--model", str(reward_folder), "--port", str(port)]
        process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            found = re.match(r"on (http://\S+):", line)
            if found:
                return process, found[1]
        raise AssertionError("the server ended before it listened")

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def _wait_for_items(url: str, count: int) -> None:
    """Wait until so many items are in the server's queue."""
    while f"prudent_queue_items {count}.0" not in urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode():
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_answers_what_is_under_way_and_ends_with_0(start: Start) -> None:
    process, url = start("--set", "wait_ms=5000", "--set", "batch_tokens=100000")
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(RewardClient(url).score, [ITEM]) for _ in range(8)]
        _wait_for_items(url, 8)  # all of them wait for others to join them
        process.send_signal(signal.SIGTERM)
        rewards = {one.result()[0]["reward"] for one in asked}
    assert len(rewards) == 1
    assert process.wait(30) == 0
    assert process.stdout is not None
    assert "requests answered; all of the queue is done" in process.stdout.read()


@pytest.mark.slow
def test_a_killed_server_that_comes_back_is_met_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WAITS", (0.5,) * 120)
    process, url = start("--set", "wait_ms=5000", "--set", "batch_tokens=100000")
    client = RewardClient(url)
    scores: list[Any] = []
    asking = threading.Thread(target=lambda: scores.extend(client.score([ITEM])))
    asking.start()
    _wait_for_items(url, 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, again = start(port=int(url.rpartition(":")[2]))
    assert again == url
    asking.join(60)
    assert scores == client.score([ITEM])


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: expected one that is free on 127.0.0.1, got {port}"):
            run_serve(ServeConfig(model=("no/such/model",), port=port))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"uvicorn, which is not installed: pip install 'prudent\[serve\]'"):
        run_serve(ServeConfig(model=("no/such/model",)))


def test_an_aggregation_of_the_whole_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one that scores each item alone"):
        ServeConfig(model=("a",), aggregation="batch_worst")


@pytest.mark.slow
def test_random_requests_get_answers_that_the_openapi_page_describes(running: Running, tmp_path: Path) -> None:
    """schemathesis makes requests from the page's schemas, right and wrong ones, and checks each answer."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    flags = ["--checks", checks, "--max-examples", "8", "--phases", "coverage,fuzzing", "--no-color", "--seed", "1"]
    command += [f"{running.url}/openapi.json", *flags, "--generation-database", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)  # it writes a cache
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"\b(\d{3,}) generated, \1 passed", done.stdout), done.stdout
