"""Launch Triton kernels, or record the launches for tests and tools."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """One kernel's tile and launch shape. The op's configs.py says what `block_rows` and `block_dim` count.

    `maxnreg`: the most registers a thread, on NVIDIA; None: the compiler's choice.
    """

    block_rows: int
    block_dim: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """The compiler's options. `maxnreg` only if it is set: Triton's AMD backend has no such option.

        `enable_fp_fusion` is passed because Triton's default differs between versions, and with it the last bits.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


class Launch(NamedTuple):
    """One requested launch: the kernel, the grid, and the arguments by name, constexprs included."""

    kernel: Any
    grid: tuple[int, ...]
    config: Config
    arguments: dict[str, Any]


_recorders: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], config: Config, device: torch.device, **arguments: Any) -> Any:
    """Run `kernel` on `device` over `grid`. Returns the compiled kernel; None under the interpreter and `recording`."""
    if _recorders:
        _recorders[-1].append(Launch(kernel, grid, config, arguments))
        return None
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        return kernel[grid](**arguments, **config.options())


def is_recording() -> bool:
    """Whether launches are appended to a list instead of run."""
    return bool(_recorders)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block, append launches to the list instead of running them. The kernels' outputs stay unwritten."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()
