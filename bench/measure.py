"""Measure time and memory of a case's variants side by side: `run(cases, device, size)` gives one Row a case.

Every round calls each variant once, in a rotating order, so that a change of clock or of the machine's load affects all
of them alike. Results are the median over the rounds with the quantiles 0.2 and 0.8. On a GPU this is the device's time
from a cold cache (gpu_time.py); the host's time of a call and the time of a CUDA graph's replay are beside it.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from . import gpu_time
from .case import Case, Check, Work
from .machine import read_bandwidth

SECONDS = {"smoke": 0.05, "small": 3.0, "full": 3.0}  # of measuring, per case
ROUNDS = (5, 400)  # at least, at most
_SAMPLE = 5e-4  # seconds: a faster call is repeated within one sample, so that the clock's cost is below 0.1 %
_READ = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes of the buffer that measures a row's read bandwidth
_REPLAYED = ("ours", "eager", "compiled")  # variants that are also timed as CUDA graphs
_REPLAY_BELOW = 5e-3  # seconds on the device: beyond it the host's part no longer shows


@dataclass
class Timing:
    """Seconds a call."""

    median: float
    q20: float
    q80: float
    rounds: int
    iterations: int

    @classmethod
    def of(cls, samples: Sequence[float], iterations: int) -> Timing:
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3], len(samples), iterations)


@dataclass
class Row:
    """A measured case. It has no times if its check failed or did not run.

    bandwidth: read bandwidth in bytes a second, the higher of two measurements just before and after the case, because
    a shared machine's changes within minutes. memory: a variant's peak bytes beyond its inputs and outputs. notes: why
    something is missing. samples: each variant's seconds per call, by round; not written to the results. On a GPU only,
    in seconds: host, until a variant's call returns; graph, its replay as a CUDA graph on the device from a cold cache.
    """

    name: str
    op: str
    mode: str
    shape: str
    dtype: str
    device: str
    bytes_moved: int
    flops: int
    bandwidth: float = 0.0
    check: Check | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)
    graph: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        return self.check is not None and self.check.passed

    def ratio(self, variant: str) -> float | None:
        """The variant's time over ours; None if either is missing."""
        if "ours" not in self.timings or variant not in self.timings:
            return None
        return self.timings[variant].median / self.timings["ours"].median

    def share(self) -> float | None:
        """Our share of the read bandwidth: the least possible bytes over our time."""
        return self.bytes_moved / self.timings["ours"].median / self.bandwidth if "ours" in self.timings else None

    def roof_share(self, matrix: float) -> float | None:
        """Our share of the roofline: the larger of the bytes' time and the operations' time at `matrix` a second, over
        our time.
        """
        if "ours" not in self.timings:
            return None
        return max(self.bytes_moved / self.bandwidth, self.flops / matrix) / self.timings["ours"].median


def run(cases: Sequence[Case], device: str | torch.device, size: str = "small", progress: bool = True) -> list[Row]:
    """Measure the cases one after another on `device`; `size` sets the time of each (SECONDS)."""
    device = torch.device(device)
    bar = tqdm(cases, unit="case", disable=not progress, file=sys.stderr, dynamic_ncols=True)
    rows = []
    for case in bar:
        bar.set_description(f"{case.op}, {case.mode}"[:48])
        rows.append(measure(case, device, SECONDS[size]))
    return rows


def measure(case: Case, device: torch.device, seconds: float) -> Row:
    """One case: its check, then times and memory if the check passed."""
    row = Row(case.name, case.op, case.mode, case.shape, case.dtype, device.type, case.bytes_moved, case.flops)
    row.bandwidth = read_bandwidth(device, _READ[device.type])
    torch.compiler.reset()  # torch limits recompilations over all cases and would then run eager
    try:
        _measure(case.make(device), row, device, seconds)
    except (RuntimeError, ValueError, ImportError) as error:  # a case that runs out of memory must not end the run
        row.notes.append(f"not measured: {_first_line(error)}")
        for found in (row.timings, row.memory, row.host, row.graph):
            found.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    row.bandwidth = max(row.bandwidth, read_bandwidth(device, _READ[device.type]))
    return row


def _measure(work: Work, row: Row, device: torch.device, seconds: float) -> None:
    row.check = work.check()
    row.notes += work.notes
    if not row.check.passed:
        return
    with torch.set_grad_enabled(work.grad):
        calls = _ready(work, row)
        row.memory = {name: extra_memory(call, device) for name, call in calls.items()}
        if device.type == "cuda":
            cuda_times(row, calls, gpu_time.Gpu(), seconds)
        else:
            row.samples, iterations = _cpu_rounds(calls, seconds)
            row.timings = {name: Timing.of(samples, iterations[name]) for name, samples in row.samples.items()}


def _ready(work: Work, row: Row) -> dict[str, _Call]:
    """The variants, compiled and warmed up. One that cannot run is left out with a note; if it is ours, raise."""
    calls = {}
    for name, function in work.variants.items():
        call = _Call(function, work.inputs)
        try:
            for _ in range(2 * len(work.inputs)):
                call()
        except Exception as error:
            if name == "ours":
                raise
            row.notes.append(f"{name}: {_first_line(error)}")
            continue
        calls[name] = call
    return calls


class _Call:
    """A variant bound to its input sets, used in turn."""

    def __init__(self, function: Callable[..., Any], inputs: list[tuple[Any, ...]]):
        self.function, self.inputs, self.turn = function, inputs, 0

    def __call__(self) -> Any:
        self.turn = (self.turn + 1) % len(self.inputs)
        return self.function(*self.inputs[self.turn])


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


Samples = dict[str, list[float]]


def _cpu_rounds(calls: dict[str, _Call], seconds: float) -> tuple[Samples, dict[str, int]]:
    iterations = {name: max(1, round(_SAMPLE / max(_wall(call, 1), 1e-7))) for name, call in calls.items()}
    return _rounds(calls, lambda name: _wall(calls[name], iterations[name]), seconds), iterations


def _wall(call: Callable[[], Any], iterations: int) -> float:
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    return (time.perf_counter() - start) / iterations


def cuda_times(row: Row, calls: Mapping[str, Callable[[], Any]], gpu: Any, seconds: float) -> None:
    """Fill in the row's host, samples and timings, then graph, which comes last because a capture that fails can leave
    the device's context broken.
    """
    row.host = {name: gpu_time.host_seconds(call, gpu) for name, call in calls.items()}
    row.samples = _rounds(calls, lambda name: gpu_time.device_seconds(calls[name], gpu, row.host[name]), seconds)
    row.timings = {name: Timing.of(samples, 1) for name, samples in row.samples.items()}
    replays = {}
    for name in _REPLAYED:
        if name in calls and row.timings[name].median < _REPLAY_BELOW:
            try:
                replays[name] = gpu.capture(calls[name])
            except Exception as error:
                row.notes.append(f"{name} as a CUDA graph: {_first_line(error)}")
    hosts = {name: gpu_time.host_seconds(replay, gpu) for name, replay in replays.items()}
    found = _rounds(replays, lambda name: gpu_time.device_seconds(replays[name], gpu, hosts[name]), seconds / 4)
    row.graph = {name: statistics.median(samples) for name, samples in found.items()}


def _rounds(calls: Mapping[str, Callable[[], Any]], sample: Callable[[str], float], seconds: float) -> Samples:
    """Run rounds of one sample each for `seconds`, within the limits of ROUNDS, with the garbage collector off."""
    names = list(calls)
    samples: Samples = {name: [] for name in names}
    if not names:
        return samples
    collecting = gc.isenabled()
    gc.disable()
    try:
        stop, done = time.perf_counter() + seconds, 0
        while done < ROUNDS[0] or (done < ROUNDS[1] and time.perf_counter() < stop):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(sample(name))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def extra_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that one call allocates beyond its inputs and outputs.

    CUDA: the allocator's peak. CPU: the running sum of the allocations that torch reports to the profiler. It includes
    the native library's and torch.compile's buffers, but not memory that a library takes from malloc directly.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - _bytes(result))
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the profiler's messages about tracing
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in memory:
        held += event.nbytes()
        peak = max(peak, held)
    return max(0, peak - _bytes(result))


def _bytes(result: Any) -> int:
    """Bytes of the tensors that a call returned; shared storage counts once."""
    tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
