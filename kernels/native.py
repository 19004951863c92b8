"""Load the native CPU library `_C.so`, and choose the instruction set that it runs on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).resolve().parents[1] / "_C.so"
VERSION = 3  # of the library's ops; must equal `version()` in csrc/ensemble_reward.cpp
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")  # slowest first, in the order of csrc/isa.h

_BUILD = (
    "Build it with `pip install --no-build-isolation -e .` in a checkout (it needs a C++17 compiler, CMake and ninja), "
    "or set PRUDENT_NATIVE=0 to silence this."
)
_forced: list[int] = []


@lru_cache(maxsize=1)
def load() -> bool:
    """Load the library once. True if its ops are in `torch.ops.prudent_native`; if not, warn once.

    With PRUDENT_NATIVE=0 the library is not loaded and there is no warning.
    """
    if os.environ.get("PRUDENT_NATIVE") == "0":
        return False
    reason = "is not built"
    if LIBRARY.is_file():
        try:
            torch.ops.load_library(LIBRARY)
            if _version() == VERSION:
                return True
            reason = f"is of another version of prudent ({_version()}, expected {VERSION}): reinstall"
        except OSError as error:
            reason = f"does not load ({error})"
    warnings.warn(
        f"prudent: the native CPU library {reason}, so the CPU runs on the slower reference. {_BUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _version() -> int:
    """The loaded library's version; libraries older than the op `version` count as 1."""
    op: Any = getattr(torch.ops.prudent_native, "version", None)
    return 1 if op is None else int(op())


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that both this machine and the library have, slowest first; () without the library."""
    if not load():
        return ()
    bits = torch.ops.prudent_native.supported_isas()
    return tuple(name for i, name in enumerate(ISAS) if bits >> i & 1)


def isa() -> str:
    """The instruction set that the CPU kernels run on: PRUDENT_CPU_ISA, else the fastest supported.

    Raises ValueError if PRUDENT_CPU_ISA names an unknown or unsupported one, RuntimeError without the library.
    """
    return ISAS[isa_index()]


def isa_index() -> int:
    return _forced[-1] if _forced else _default_index()


@lru_cache(maxsize=1)
def _default_index() -> int:
    fastest = ("", *supported_isas())[-1]
    return _index(os.environ.get("PRUDENT_CPU_ISA") or fastest, "PRUDENT_CPU_ISA")


def _index(name: str, source: str) -> int:
    supported = supported_isas()
    if not supported:
        raise RuntimeError("prudent: the native CPU library is not loaded, so there is no instruction set to choose")
    if name not in supported:
        why = " (this machine lacks it)" if name in ISAS else ""
        raise ValueError(f"{source}: expected one of {', '.join(supported)}, got {name!r}{why}")
    return ISAS.index(name)


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels on the instruction set `name` inside the block; ValueError if it is not supported here."""
    _forced.append(_index(name, "isa"))
    try:
        yield
    finally:
        _forced.pop()
