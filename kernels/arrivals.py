"""The counters in which the programs of a launch count their arrivals, so that the last one can finish the work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

COUNTERS = 320  # in a row; 1280 bytes, so every row has the 16-byte alignment that a kernel was compiled for
ROWS = 64

_free: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def arrivals(device: torch.device, count: int = 1) -> Tensor:
    """At least `count` (at most COUNTERS) int32 zeros on `device`; the kernel that counts in them leaves them zero.

    A stream has one row for all its calls: its kernels run one after another. A captured graph may be replayed beside
    its stream's eager calls, so each call in it takes a row for good.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    return _row(device, None if capturing else torch.cuda.current_stream(device).cuda_stream)


def _row(device: torch.device, stream: int | None) -> Tensor:
    """The stream's row, or (None: a call that is being captured) a new one."""
    if stream is not None and (device, stream) in _of_stream:
        return _of_stream[device, stream]
    if device not in _free and stream is not None:  # memory is not asked for in a capture
        with ThreadPoolExecutor(1) as thread:
            # torch.compile's cudagraphs send what the calling thread allocates to the graph's pool, also before the
            # capture; memory from there that outlives the call would be handed out again
            _free[device] = thread.submit(_zero_rows, device).result()
    if not _free.get(device):
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)  # in a graph: zeroed by each replay
    row = _free[device].pop()
    if stream is not None:
        _of_stream[device, stream] = row
    return row


def _zero_rows(device: torch.device) -> list[Tensor]:
    rows = torch.zeros(ROWS, COUNTERS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams are going to read them
    return list(rows)
