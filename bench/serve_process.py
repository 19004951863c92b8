"""The server under load, and the texts whose direct scores its replies must have."""

from __future__ import annotations

import json
import os
import random
import re
import string
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..engine import Scorer
from .serve_client import Reply


class Texts:
    """Texts and their direct scores; request i asks for text i modulo their number."""

    def __init__(self, scorer: Scorer, count: int) -> None:
        draw = random.Random(0)
        words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 8))) for _ in range(500)]
        self.texts = [" ".join(draw.choices(words, k=draw.randint(4, 40))) for _ in range(count)]
        rewards = scorer.score(self.texts).reward
        self.rewards = [reward for reward in rewards if reward is not None]
        assert len(self.rewards) == count

    def body(self, index: int) -> bytes:
        """The body of request `index`."""
        return json.dumps({"texts": [self.texts[index % len(self.texts)]]}).encode()

    def difference(self, index: int, reply: Reply) -> float:
        """|reply - direct score|; infinite for a reply without a reward."""
        if reply.status != 200:
            return float("inf")
        reward = json.loads(reply.body)["scores"][0]["reward"]
        return float("inf") if reward is None else abs(reward - self.rewards[index % len(self.rewards)])


class Process:
    """A `prudent serve` process on `port`, its standard error read until it listens."""

    def __init__(self, model: str, flags: Sequence[str], port: int = 0) -> None:
        command = [sys.executable, "-m", "prudent.cli", "serve", "--model", model, "--port", str(port), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self.process.stderr is not None
        found = next((m for line in self.process.stderr if (m := re.match(r"on http://[^ ]*:(\d+):", line))), None)
        if found is None:
            raise RuntimeError("prudent serve ended before it listened")
        self.port = int(found[1])

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cpu_seconds(self) -> float:
        """What the process has used of the machine's cores: the one steady measure beside other work. Linux alone."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        page = urllib.request.urlopen(f"{self.url}/metrics", timeout=60).read().decode()
        values = re.findall(rf"^prudent_{name}(?:\{{[^}}]*\}})? (\S+)$", page, re.M)
        return sum(map(float, values))


@contextmanager
def serving(model: str, flags: Sequence[str] = (), port: int = 0) -> Iterator[Process]:
    """A running server, killed at the end if it still runs."""
    server = Process(model, flags, port)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()
