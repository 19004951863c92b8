"""Try to break `prudent serve`; after each fault it must answer right."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from ..rlhf.doors.client import RewardClient
from .serve_client import load, request
from .serve_process import Process, Texts, serving

_CLIENTS, _HALF_OPEN, _LEAVING = 256, 64, 200


def run_faults(model: str, texts: Texts, tolerance: float) -> list[dict[str, Any]]:
    """Every fault on a server of its own: {"name", "found", "holds"}; holds is None if it could not be tried."""
    faults: list[tuple[Callable[..., tuple[str, bool | None]], list[str]]] = [
        (overload, ["--set", "max_queue=32"]),
        (half_open_clients, ["--set", "read_timeout=3"]),
        (leaving_clients, ["--set", "wait_ms=200", "--set", "batch_tokens=200000"]),
        (broken_json, []),
        (schemas, []),
    ]
    rows = []
    for fault, flags in faults:
        with serving(model, flags) as server:
            found, holds = fault(server, texts, tolerance)
            after = _right(server, texts, tolerance)
        name = fault.__name__.replace("_", " ")
        rows.append({"name": name, "found": found, "holds": holds if after else False})
        print(rows[-1], flush=True)
    found, holds = kill(model, texts, tolerance)
    rows.append({"name": "kill -9", "found": found, "holds": holds})
    print(rows[-1], flush=True)
    return rows


def _right(server: Process, texts: Texts, tolerance: float, requests: int = 50) -> bool:
    replies = asyncio.run(load(server.port, texts.body, 8, requests))
    return all(texts.difference(index, reply) <= tolerance for index, reply in enumerate(replies))


def overload(server: Process, texts: Texts, tolerance: float) -> tuple[str, bool]:
    """256 clients and a queue of 32 items: a reply is right, or 429 with Retry-After."""
    replies = asyncio.run(load(server.port, texts.body, _CLIENTS, 4 * _CLIENTS))
    counts = Counter(reply.status for reply in replies)
    right = all(
        texts.difference(index, reply) <= tolerance if reply.status == 200 else int(reply.headers["retry-after"]) >= 1
        for index, reply in enumerate(replies)
    )
    found = f"{len(replies)} requests of {_CLIENTS} clients: {counts[200]} right, {counts[429]} told to come again"
    return found, right and set(counts) == {200, 429}


def half_open_clients(server: Process, texts: Texts, tolerance: float) -> tuple[str, bool]:
    """64 clients that send half a head or half a body, while others ask: these are answered, those hung up on."""
    whole = request("/score", texts.body(0))
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(_HALF_OPEN)]
    for number, connection in enumerate(held):
        connection.sendall(whole[: 20 if number % 2 else len(whole) - 5])
    right = _right(server, texts, tolerance, 200)
    ends = []
    for connection in held:
        connection.settimeout(60)
        ends.append(connection.recv(4096)[:12])
        connection.close()
    counts = Counter(end.decode() or "closed" for end in ends)
    found = f"200 other requests right: {right}; the {_HALF_OPEN}: " + ", ".join(f"{n} {e}" for e, n in counts.items())
    return found, right and counts == {"closed": _HALF_OPEN // 2, "HTTP/1.1 408": _HALF_OPEN // 2}


def leaving_clients(server: Process, texts: Texts, tolerance: float) -> tuple[str, bool]:
    """200 clients that ask and leave at once, before the wait for others is over: nothing is scored for them."""
    before = server.metric("items_total")
    for index in range(_LEAVING):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request("/score", texts.body(index)))
    end = time.monotonic() + 60
    while server.metric("queue_items") and time.monotonic() < end:
        time.sleep(0.05)
    scored, dropped = server.metric("items_total") - before, server.metric("dropped_items_total")
    found = f"{_LEAVING} left: {dropped:.0f} items dropped from the queue, {scored:.0f} scored for nobody"
    return found, server.metric("queue_items") == 0 and scored <= _LEAVING / 4


def broken_json(server: Process, texts: Texts, tolerance: float) -> tuple[str, bool]:
    """Bodies with bytes changed, removed or repeated: an answer or a 4xx, never a 5xx or a broken connection."""
    draw = random.Random(0)

    def spoilt(index: int) -> bytes:
        raw = bytearray(texts.body(index))
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(raw))
            raw[place : place + draw.randint(0, 3)] = draw.choice(
                [b"", b"\xff", b"[", b'"', b"1e999", b"\\ud800", b"{"]
            )
        return bytes(raw)

    paths = ("/score", "/get_reward", "/slime", "/v1/score/evaluation", "/verify", "/classify", "/pooling", "/compare")
    counts = Counter(reply.status for path in paths for reply in asyncio.run(load(server.port, spoilt, 8, 200, path)))
    found = f"{200 * len(paths)} bodies: " + ", ".join(
        f"{count} x {status}" for status, count in sorted(counts.items())
    )
    return found, set(counts) <= {200, 400, 413, 422}


def schemas(server: Process, texts: Texts, tolerance: float) -> tuple[str, bool | None]:
    """schemathesis on the OpenAPI page: no server error, and every answer as the page describes it."""
    if find_spec("schemathesis") is None:
        return "schemathesis is not installed", None
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    command += [f"{server.url}/openapi.json", "--checks", checks, "--max-examples", "20", "--seed", "1"]
    command += ["--phases", "coverage,fuzzing", "--no-color", "--generation-database", "none"]
    with tempfile.TemporaryDirectory() as folder:  # for its cache
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    cases = re.search(r"\d+ generated.*", done.stdout)
    return f"schemathesis: {cases[0] if cases else done.stdout[-200:]}", done.returncode == 0


def kill(model: str, texts: Texts, tolerance: float) -> tuple[str, bool]:
    """kill -9 while 16 clients ask, and a restart on the same port 2 s later: each gets all of its rewards, right."""
    count, rounds = 16, 20
    with serving(model) as server:
        done = threading.Semaphore(0)

        def ask(number: int) -> list[float]:
            client, rewards = RewardClient(server.url), []
            for step in range(rounds):
                rewards.append(client.score([texts.texts[number * rounds + step]])[0]["reward"])
                done.release()
            return rewards

        with ThreadPoolExecutor(count) as threads:
            asked = [threads.submit(ask, number) for number in range(count)]
            for _ in range(count * rounds // 4):
                done.acquire()
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            time.sleep(2)
            with serving(model, port=server.port):
                try:
                    answers = [reward for one in asked for reward in one.result()]
                except ValueError as error:  # the server came back later than the client's last try
                    return str(error), False
    differences = [abs(a - b) for a, b in zip(answers, texts.rewards, strict=False)]
    wrong = sum(difference > tolerance for difference in differences)
    found = f"{len(answers)} of {count * rounds} rewards arrived, {wrong} wrong (a quarter before the kill)"
    return found, len(answers) == count * rounds and wrong == 0
