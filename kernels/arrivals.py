"""The counters in which the programs of a launch count their arrivals, so that the last one can finish the work."""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int, int], Tensor] = {}


def arrivals(device: torch.device, count: int = 1) -> Tensor:
    """[count] int32 zeros on `device`; the kernel that counts in them leaves them zero.

    One tensor per device and stream: kernels of a stream run one after another. A captured graph gets its own, zeroed
    by each replay, since it may be replayed beside its stream's eager calls.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, count)
    if key not in _counters:
        _counters[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _counters[key]
