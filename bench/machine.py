"""Describe the conditions of a result: the machine with its measured rates, the commit, the versions."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import native
from . import gpu_time
from .case import DTYPES

_ROOT = Path(__file__).resolve().parents[1]
_READ = {"cpu": 1 << 30, "cuda": 8 << 30}  # bytes, far more than any last-level cache
_MATRIX = {"cpu": 2048, "cuda": 8192}
_PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")


@dataclass
class Machine:
    """bandwidth: bytes a second of the fastest measured read. matrix: dtype -> operations a second of F.linear."""

    device: str
    name: str
    cores: int
    threads: int
    cache_bytes: int
    isa: str
    bandwidth: float
    matrix: dict[str, float]
    commit: str
    dirty: bool
    date: str
    versions: dict[str, str]

    def same_as(self, other: Machine) -> bool:
        """Whether both are the same kind of machine with the same number of threads."""
        return all(getattr(self, n) == getattr(other, n) for n in ("device", "name", "cores", "threads", "isa"))


def again(machine: Machine, seen: Iterable[float] = (), quick: bool = False) -> Machine:
    """Measure the rates again after the cases and keep the highest; `seen`: bandwidths measured with the cases."""
    device = torch.device(machine.device)
    bandwidth, matrix = _ceilings(device, quick)
    highest = {name: max(rate, machine.matrix[name]) for name, rate in matrix.items()}
    return replace(machine, bandwidth=max(bandwidth, machine.bandwidth, *seen), matrix=highest)


def _ceilings(device: torch.device, quick: bool) -> tuple[float, dict[str, float]]:
    bandwidth = read_bandwidth(device, 1 << 24 if quick else _READ[device.type])
    width = 256 if quick else _MATRIX[device.type]
    return bandwidth, {name: matrix_rate(device, dtype, width) for name, dtype in DTYPES.items()}


def describe(device: str | torch.device, quick: bool = False) -> Machine:
    """Measure the rates (some seconds; `quick` uses a small buffer, for tests) and read the rest from the system."""
    device = torch.device(device)
    commit, dirty = revision()
    bandwidth, matrix = _ceilings(device, quick)
    cuda = device.type == "cuda"
    return Machine(
        device=device.type,
        name=torch.cuda.get_device_name(device) if cuda else cpu_name(),
        cores=torch.cuda.get_device_properties(device).multi_processor_count if cuda else _cores(),
        threads=torch.get_num_threads(),
        cache_bytes=_cache(device),
        isa=native.isa() if native.load() else "none: reference",
        bandwidth=bandwidth,
        matrix=matrix,
        commit=commit,
        dirty=dirty,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        versions=_versions(),
    )


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of the fastest of four vectorised reductions of a buffer of `size` bytes, on torch's threads."""
    buffer = torch.ones(size // 4, device=device)
    rows = buffer.view(-1, 4096)
    readers: tuple[Callable[[], Any], ...] = (
        buffer.sum,
        lambda: rows.sum(dim=1),
        buffer.amax,
        lambda: torch.dot(buffer[: 2**31 - 1], buffer[: 2**31 - 1]) if device.type == "cpu" else rows.amax(dim=1),
    )
    return size / min(_least_time(reader, device) for reader in readers)


def matrix_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Floating-point operations a second of F.linear on two square matrices, in torch's present precision."""
    a = torch.randn(width, width, device=device).to(dtype)
    return 2 * width**3 / _least_time(lambda: F.linear(a, a), device)


def _least_time(function: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    if device.type == "cuda":
        gpu = gpu_time.Gpu()

        def sample() -> float:
            return gpu_time.device_seconds(function, gpu, 0.0)
    else:

        def sample() -> float:
            began = time.perf_counter()
            function()
            return time.perf_counter() - began

    with torch.no_grad():
        sample()
        return min(sample() for _ in range(rounds))


def cpu_name() -> str:
    """The processor's name from the kernel, else from Python's platform module."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache(device: torch.device) -> int:
    """Bytes of the last-level cache (a GPU's L2); 0 if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=0)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def revision() -> tuple[str, bool]:
    """The commit, and whether a tracked file (results excepted) differs from it. Outside git, PRUDENT_COMMIT names the
    commit of a copied checkout; else ("unknown", True).
    """
    commit = _git("rev-parse", "HEAD") or os.environ.get("PRUDENT_COMMIT", "")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    return (commit, bool(changed)) if commit else ("unknown", True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in ("prudent", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
