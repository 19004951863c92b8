"""How a call is timed on a GPU, with a recorder in its place: what is queued, in which order, and what is kept."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from prudent.bench import gpu_goals, gpu_time, machine, measure, report


class Event:
    def __init__(self, gpu: Recorder):
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.gpu.queue("record")
        self.at = self.gpu.clock

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Recorder:
    """A GPU whose clock advances by what is queued: a call takes 2 ms, a replay 1 ms."""

    def __init__(self, captures: bool = True):
        self.queued: list[str] = []
        self.slept: list[float] = []
        self.clock, self.captures = 0.0, captures

    def queue(self, name: str, seconds: float = 0.0) -> None:
        self.queued.append(name)
        self.clock += seconds

    def event(self) -> Event:
        return Event(self)

    def synchronize(self) -> None:
        self.queued.append("synchronize")

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.queue("sleep", seconds)

    def read(self) -> None:
        self.queue("read", 3e-4)

    def call(self) -> None:
        self.queue("call", 2e-3)

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: self.queue("replay", 1e-3)


def empty_row() -> measure.Row:
    return measure.Row("toy", "toy", "m", "s", "fp32", "cuda", 8, 8)


def test_only_the_call_is_between_the_events_and_the_cache_is_emptied_by_reading_before_them() -> None:
    gpu = Recorder()
    assert gpu_time.device_seconds(gpu.call, gpu, host=4e-3) == pytest.approx(2e-3)
    assert gpu.queued == ["sleep", "read", "record", "call", "record"]


def test_the_device_sleeps_longer_than_the_host_takes_but_not_for_ever() -> None:
    gpu = Recorder()
    for host in (1e-5, 1e-3, 60.0):
        gpu_time.device_seconds(gpu.call, gpu, host)
    assert gpu.slept[0] > 1e-5
    assert gpu.slept[1] > 1e-3
    assert gpu.slept[2] < 0.1


def test_the_hosts_time_starts_on_an_idle_device_and_ends_when_the_call_returns() -> None:
    gpu = Recorder()

    def call() -> None:
        gpu.call()
        time.sleep(2e-3)

    assert 2e-3 <= gpu_time.host_seconds(call, gpu) < 0.1
    assert gpu.queued[:4] == ["synchronize", "call"] * 2
    assert gpu.queued.count("call") <= 20


def test_a_row_has_the_device_the_host_and_the_replay_of_its_variants_and_peers_are_not_captured() -> None:
    gpu, row = Recorder(), empty_row()
    measure.cuda_times(row, {"ours": gpu.call, "eager": gpu.call, "liger": gpu.call}, gpu, seconds=0.0)
    assert {name: t.median for name, t in row.timings.items()} == pytest.approx(dict.fromkeys(row.host, 2e-3))
    assert set(row.host) == {"ours", "eager", "liger"}
    assert row.graph == pytest.approx({"ours": 1e-3, "eager": 1e-3})
    assert row.notes == []


def test_a_capture_that_fails_is_noted_and_the_other_times_stay() -> None:
    gpu, row = Recorder(captures=False), empty_row()
    measure.cuda_times(row, {"ours": gpu.call}, gpu, seconds=0.0)
    assert row.timings["ours"].median == pytest.approx(2e-3)
    assert row.graph == {}
    assert row.notes == ["ours as a CUDA graph: RuntimeError: operation not permitted when stream is capturing"]


def test_a_call_so_long_that_its_host_part_does_not_show_is_not_captured() -> None:
    gpu, row = Recorder(), empty_row()
    measure.cuda_times(row, {"ours": lambda: gpu.queue("call", 6e-3)}, gpu, seconds=0.0)
    assert row.graph == {}
    assert "replay" not in gpu.queued


def test_host_and_replay_are_in_the_table_the_csv_the_json_and_the_report() -> None:
    gpu, row = Recorder(), empty_row()
    measure.cuda_times(row, {"ours": gpu.call, "eager": gpu.call}, gpu, seconds=0.0)
    row.host, row.bandwidth = {"ours": 1.2e-4, "eager": 3e-4}, 1e9
    here = machine.Machine("cuda", "some GPU", 132, 16, 0, "", 1e9, {"fp32": 1e9}, "a" * 40, False, "today", {})
    shown = report.table([row], here)
    assert "host 120 us" in shown
    assert "graph 1.00 ms" in shown
    lines = list(csv.DictReader(report.to_csv([row], here).splitlines()))
    assert [(line["variant"], float(line["host_seconds"])) for line in lines] == [("ours", 1.2e-4), ("eager", 3e-4)]
    assert [float(line["graph_seconds"]) for line in lines] == pytest.approx([1e-3, 1e-3])
    fields = json.loads(json.dumps(report.to_json([row], here)))["rows"][0]
    assert report._row(fields).host == row.host
    assert "| 2000.0 µs | 120.0 µs | 1000.0 µs |" in gpu_goals._case_line(fields)
