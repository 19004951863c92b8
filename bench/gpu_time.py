"""Time a call on a GPU: on the device from a cold cache, on the host, and as a CUDA graph's replay.

Before every timed call the device sleeps while the host queues all that follows, then reads a buffer far larger than
the L2 cache: the events around the call measure neither the host nor lines that a flush by writing would leave dirty.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH = 1 << 30  # bytes, far beyond any L2 cache
_SPIN = 10_000_000  # cycles of the sleep that measures the clock, 5 ms at 2 GHz
_SLACK = 1e-4  # seconds that the host needs for the flush and two events
_LONGEST = 0.05  # seconds of sleep: a call that waits for the device itself cannot be queued ahead
_CALLS, _HOST_TIME = (3, 20), 0.2  # of host_seconds: at least and at most so many calls, for about so many seconds


class Gpu:
    """The current CUDA device, as far as timing needs it; tests put a recorder in its place."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(FLUSH // 4, device="cuda")
        self.read()
        torch.cuda._sleep(_SPIN)  # the first launch loads the kernel
        start, end = self.event(), self.event()
        start.record()
        torch.cuda._sleep(_SPIN)
        end.record()
        end.synchronize()
        self.cycles_a_second = _SPIN / (start.elapsed_time(end) / 1e3)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def sleep(self, seconds: float) -> None:
        """Keep the device busy and return at once."""
        torch.cuda._sleep(int(seconds * self.cycles_a_second))

    def read(self) -> None:
        """Evict everything else from the L2 cache, written lines included, and leave none to be written back."""
        self.buffer.amax()

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return capture(call)


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays one call as a CUDA graph and returns the captured outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def host_seconds(call: Callable[[], Any], gpu: Any) -> float:
    """Seconds until a call returns to the host, the device idle before it: the median of at most 20 calls."""
    samples: list[float] = []
    stop = time.perf_counter() + _HOST_TIME
    while len(samples) < _CALLS[0] or (len(samples) < _CALLS[1] and time.perf_counter() < stop):
        gpu.synchronize()
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    gpu.synchronize()
    return statistics.median(samples)


def device_seconds(call: Callable[[], Any], gpu: Any, host: float) -> float:
    """Seconds of one call on the device, from a cold cache. host: its host_seconds, during which the device sleeps."""
    start, end = gpu.event(), gpu.event()
    gpu.sleep(min(1.5 * host + _SLACK, _LONGEST))
    gpu.read()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
