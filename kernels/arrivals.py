"""Arrival counters: a launch's programs count themselves, so that the last one can finish the work.

triton_arrivals.py has the device's side.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

COUNTERS = 320  # in a row: 1280 bytes, so that every row has the 16-byte alignment that kernels are compiled for
ROWS = 64  # allocated at once

# By AMD family, the instruction that waits until a wave's own stores have reached the L2. A barrier does not wait for
# stores in flight, and a release waits only for those of the wave that executes it, but every wave stores results. So
# each wave waits for its own before the barrier; the release after it then writes the L2 back.
_STORES_DONE = {
    "gfx9": "s_waitcnt vmcnt(0)",
    "gfx11": "s_waitcnt_vscnt null, 0x0",
    "gfx12": "s_wait_storecnt 0x0",
}

_free: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


@cache
def architecture(device: torch.device) -> str:
    """The AMD architecture of `device`, as "gfx942"; "" for any other device."""
    if device.type != "cuda" or torch.version.hip is None:
        return ""
    return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]


@cache
def stores_done(arch: str) -> str:
    """What a wave of an AMD GPU executes to wait for its own stores; "" on any other device.

    ValueError for an AMD family whose instruction is not known.
    """
    if not arch.startswith("gfx"):
        return ""
    for family, instruction in _STORES_DONE.items():
        if arch.startswith(family):
            return instruction
    raise ValueError(f"arrivals: device: expected an AMD GPU of {', '.join(_STORES_DONE)}, got {arch}")


def arrivals(device: torch.device, count: int = 1) -> Tensor:
    """At least `count` (at most COUNTERS) int32 zeros on `device`; the kernel that counts in them leaves them zero.

    All eager calls on a stream share one row, because a stream's kernels run one after another. A captured graph may be
    replayed beside eager calls, so each captured call keeps a row of its own.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _row(device, None)
    # without the Stream object of torch.cuda.current_stream, whose making takes longer than the rest of this function
    return _row(device, torch._C._cuda_getCurrentRawStream(device.index))


def _row(device: torch.device, stream: int | None) -> Tensor:
    """The row of `stream`; a new one if `stream` is None, that is, during capture."""
    if stream is not None and (device, stream) in _of_stream:
        return _of_stream[device, stream]
    if device not in _free and stream is not None:  # allocate nothing during capture
        with ThreadPoolExecutor(1) as thread:
            # With torch.compile's CUDA graphs the calling thread allocates from the graph's pool, even before capture.
            # That memory is reused after the call, so another thread allocates the rows.
            _free[device] = thread.submit(_zero_rows, device).result()
    if not _free.get(device):
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)  # part of the graph: each replay zeroes it
    row = _free[device].pop()
    if stream is not None:
        _of_stream[device, stream] = row
    return row


def _zero_rows(device: torch.device) -> list[Tensor]:
    rows = torch.zeros(ROWS, COUNTERS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams will read them
    return list(rows)
