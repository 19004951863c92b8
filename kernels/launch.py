"""How every Triton kernel of the package is launched, and how tests and tools see what would be launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """One kernel's tile and launch shape. `block_rows`, `block_dim`: what the kernel's own table says they are."""

    block_rows: int
    block_dim: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """A launch as it was asked for: the kernel, the grid, and the arguments by name, constexprs included."""

    kernel: Any
    grid: tuple[int, ...]
    config: Config
    arguments: dict[str, Any]


_recorders: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], config: Config, device: torch.device, **arguments: Any) -> None:
    """Run `kernel` on `device` over `grid`. fp fusion is stated because Triton's default changes between versions, and
    with it the last bits.
    """
    if _recorders:
        _recorders[-1].append(Launch(kernel, grid, config, arguments))
        return
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[grid](**arguments, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block no kernel runs: the list gets every launch, to compile ahead of time. Outputs stay unwritten."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()
