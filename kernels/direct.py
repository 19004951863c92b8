"""Start a compiled Triton kernel without Triton's launcher in Python, which binds and specialises every argument again.

All that depends on Triton's private interface is here: how a compiled kernel is started, which settings make Triton
compile another one or call something around a launch, and which driver tells the stream. The interface is that of
Triton 3.4 to 3.9 on CUDA. Elsewhere there is no `Direct`, and the caller launches by `kernel[grid](...)` as always. So
it does on ROCm, where Triton compiles another kernel for a tensor in more than 2 GB of storage too, which callers here
do not tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs

OLDEST, NEWEST = (3, 4), (3, 9)  # of Triton, whose `CompiledKernel.run` takes the arguments that `start` passes


def _known_interface() -> bool:
    if torch.version.hip is not None:
        return False
    major, minor = triton.__version__.split(".")[:2]
    return OLDEST <= (int(major), int(minor)) <= NEWEST


def _settings() -> tuple[object, ...]:
    """What, apart from the arguments, decides which kernel Triton's launcher takes from its cache."""
    runtime, compilation = knobs.runtime, knobs.compilation
    return (
        runtime.debug,
        getattr(runtime, "add_stages_inspection_hook", None),
        getattr(compilation, "instrumentation_mode", ""),
        getattr(compilation, "fpsan_homomorphic_casts", None),
    )


def _hooked(hook: Any) -> bool:
    """Whether a launch hook (None or a function, a HookChain from Triton 3.5) has something to call."""
    return hook is not None and bool(getattr(hook, "calls", True))


class Direct(NamedTuple):
    """A compiled kernel, loaded on one device, with what starts it."""

    kernel: Any  # the JITFunction
    run: Any  # Triton's launcher of the compiled kernel, which calls the driver
    function: Any
    metadata: Any
    settings: tuple[object, ...]

    @classmethod
    def of(cls, kernel: Any, compiled: Any) -> Direct | None:
        """From what `kernel[grid](...)` returned after its launch; None if Triton's interface is not the known one."""
        if not _known_interface():
            return None
        run, function, metadata = (getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))
        if not callable(run) or function is None or metadata is None:
            return None
        return cls(kernel, run, function, metadata, _settings())

    def usable(self, device: torch.device) -> bool:
        """Whether Triton's launcher would now start this very kernel, with nothing before or after the launch.

        False on a device that is not the current one: the caller's plain launch makes it so.
        """
        runtime = knobs.runtime
        if _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook) or self.kernel.pre_run_hooks:
            return False
        if device.type == "cuda" and device.index != triton.runtime.driver.active.get_current_device():
            return False
        return self.settings == _settings()

    def start(self, grid: tuple[int, int, int], device: torch.device, arguments: Sequence[Any]) -> None:
        """Launch on the device's current stream. `arguments`: one for each parameter; a pointer as an address."""
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        self.run(*grid, stream, self.function, self.metadata, None, None, None, *arguments)
