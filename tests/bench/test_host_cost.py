"""The host's time in a call: measured through Triton's own launcher, which really comes to the driver's launch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prudent.bench import host_cost

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stub stands for a driver that this machine has"),
]


def test_both_ways_are_timed_and_every_launch_reaches_the_driver(tmp_path: Path) -> None:
    """In a child process, which alone gets the stub; it asserts the number of launches itself."""
    out = tmp_path / "host"
    command = [sys.executable, "-m", "prudent.bench.host_cost", "--rows", "3", "40", "--rounds", "2", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    times = json.loads(out.with_suffix(".json").read_text())["times"]
    assert set(times) == {"3", "40"}
    for ways in times.values():
        assert set(ways) == set(host_cost.WAYS)
        assert all(0 < way["least"] <= way["median"] for way in ways.values())
        assert ways["repeated"]["least"] < ways["plain"]["least"]
    assert out.with_suffix(".md").read_text().count("| repeated |") == 2


def test_a_missed_goal_is_said() -> None:
    record = {"machine": "a machine", "torch": "2", "triton": "3", "date": "today", "rounds": 1, "calls": 1}
    for least, said in ((host_cost.GOAL, "NO"), (host_cost.GOAL - 1, "yes")):
        times = {"8": {"plain": {"least": 90.0, "median": 95.0}, "repeated": {"least": least, "median": 99.0}}}
        assert host_cost.table({**record, "times": times}).strip().endswith(f"| {said} |")
