"""Choose a kernel's tile by timing, if PRUDENT_AUTOTUNE=1. Without it every call takes the tile of the static table.

A choice is timed once for each (kernel, bucket of shapes, device, versions), then read from
$PRUDENT_CACHE/tuning.json (~/.cache/prudent by default). A tile changes the order of sums: with tuning on, the last
bits of a result may differ between machines and between caches.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .launch import Config

_chosen: dict[str, Config] = {}


def enabled() -> bool:
    """Whether tiles are chosen by timing."""
    return os.environ.get("PRUDENT_AUTOTUNE") == "1"


def choose(
    table_config: Config,
    candidates: Sequence[Config],
    key: tuple[object, ...],
    run: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The fastest of `table_config` and `candidates`; `table_config` if tuning is off or impossible now.

    `key` names the kernel and its bucket of shapes. It must not contain a sequence length, or each length is timed.
    `run` launches the kernel on `device` with a config, any number of times, into outputs that the real launch
    overwrites.
    """
    if not enabled() or not _can_time(device):
        return table_config
    with torch.cuda.device(device):  # time and name this device, which may not be the current one
        return _fastest(table_config, candidates, key, run)


def _fastest(
    table_config: Config, candidates: Sequence[Config], key: tuple[object, ...], run: Callable[[Config], object]
) -> Config:
    candidates = [table_config, *(c for c in candidates if c != table_config)]
    name = "|".join(str(part) for part in (*key, *_machine()))
    if name not in _chosen:
        kept = _read().get(name)
        known = Config(*kept) if isinstance(kept, list) and len(kept) == len(Config._fields) else None
        if known not in candidates:
            if kept is not None:
                warnings.warn(f"tuning: {cache_file()}: expected one of this version's tiles for {name}, got {kept}; "
                              "timing it again", stacklevel=2)  # fmt: skip
            known = min(candidates, key=lambda config: _milliseconds(run, config))
            _write(name, known)
        assert known is not None
        _chosen[name] = known
    return _chosen[name]


def cache_file() -> Path:
    """The file that keeps choices between processes."""
    return Path(os.environ.get("PRUDENT_CACHE") or Path.home() / ".cache" / "prudent") / "tuning.json"


def _can_time(device: torch.device) -> bool:
    """False during graph capture, which would record the launches instead of timing them."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _machine() -> tuple[str, ...]:
    import triton

    return torch.cuda.get_device_name(), f"torch {torch.__version__}", f"triton {triton.__version__}"


def _milliseconds(run: Callable[[Config], object], config: Config) -> float:
    """Median time with a cold L2; infinite for a tile that this device cannot hold."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: run(config), warmup=10, rep=50, return_mode="median"))
    except OutOfResources:
        return float("inf")


def _read() -> dict[str, Any]:
    """The cache's table; empty if there is none, and with a warning if it cannot be read."""
    path = cache_file()
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"tuning: {path}: expected a JSON table, got {error}; it will be overwritten", stacklevel=3)
        return {}
    if not isinstance(found, dict):
        warnings.warn(f"tuning: {path}: expected a JSON table, got a {type(found).__name__}; it will be overwritten",
                      stacklevel=3)  # fmt: skip
        return {}
    return found


def _write(name: str, config: Config) -> None:
    """Add one choice. The file is replaced as a whole, so that readers see the old table or the new one."""
    path = cache_file()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a broken table was reported when it was read
        table = {**_read(), name: list(config)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="tuning.", delete=False) as file:
            json.dump(table, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"tuning: {path}: expected to write the tuned tile there, got {error}; "
                      "it is kept for this process only", stacklevel=3)  # fmt: skip
