"""A stand-in for Triton's CUDA driver, so that launches can be counted, compared and timed on a machine without a GPU.

Inside `fake_gpu()`, Triton takes the machine for one with an H100, and tensors on the CPU for tensors on it. Triton's
own launcher in Python runs as on a GPU: it binds the arguments, specialises them, looks for a compiled kernel and
starts it. Compiling only notes what was asked for, and starting a kernel only notes its arguments, so that every output
stays uninitialised.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch


class Compilation(NamedTuple):
    """A kernel that Triton asked for: its name, and the types, constants and attributes that it is specialised to."""

    kernel: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]


class Start(NamedTuple):
    """A start of a kernel: which compilation, and what a driver gets; tensors as their addresses."""

    kernel: str
    compilation: int
    grid: tuple[int, int, int]
    stream: int
    arguments: dict[str, Any]


class Compiled:
    """What Triton gets for a compiled kernel."""

    def __init__(self, driver: Driver, kernel: Any, compilation: int) -> None:
        self._driver, self._kernel, self.function = driver, kernel, compilation
        self.packed_metadata = ("metadata", compilation)
        self.run = self._start

    def launch_metadata(self, *arguments: Any) -> None:
        """None: no hook asks for it."""

    def _start(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
        assert metadata == self.packed_metadata
        _, enter, leave, *values = rest
        names = [parameter.name for parameter in self._kernel.params]
        addresses = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        for hook in (enter, leave):
            if hook is not None:
                hook(None)
        arguments = dict(zip(names, addresses, strict=True))
        self._driver.starts.append(Start(self._kernel.__name__, function, (x, y, z), stream, arguments))


class Driver:
    """The stand-in. `stream`, `device` and `capturing` are what it answers; `compilations` and `starts` what it saw."""

    def __init__(self) -> None:
        self.stream, self.device, self.capturing = 0, 0, False
        self.compilations: list[Compilation] = []
        self.starts: list[Start] = []

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None) -> int:
        return self.stream

    def compile(self, source: Any, target: Any = None, options: Any = None, **others: Any) -> Compiled:
        """In the place of `triton.compile`."""
        name = source.fn.__name__
        self.compilations.append(
            Compilation(name, dict(source.signature), dict(source.constants), dict(source.attrs), dict(options))
        )
        return Compiled(self, source.fn, len(self.compilations) - 1)


@contextlib.contextmanager
def fake_gpu(driver: Driver | None = None) -> Iterator[Driver]:
    """Inside the block, run `ensemble_reward` as on an H100 that computes nothing, with `driver` or a new `Driver`.
    ValueError under Triton's interpreter, which launches nothing.
    """
    import triton

    from ..kernels import arrivals
    from ..kernels.ensemble_reward import configs, contract, op
    from ..kernels.ensemble_reward import triton as execution  # type: ignore[attr-defined]

    if triton.knobs.runtime.interpret:
        raise ValueError("fake_gpu: expected Triton without its interpreter, got TRITON_INTERPRET=1")
    driver, active = driver or Driver(), triton.runtime.driver

    def counters(device: torch.device, count: int = 1) -> torch.Tensor:
        return arrivals._row(device, None if driver.capturing else driver.stream)

    def debugging(leader: torch.Tensor) -> bool:
        return os.environ.get("PRUDENT_DEBUG") == "1"

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (op, "_backend", lambda inputs: execution),
            (contract, "values_are_read", debugging),
            (configs, "_platform_of", lambda device: configs._TARGETS["sm_90"]),
            (execution, "arrivals", counters),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        for table in (arrivals._free, arrivals._of_stream):
            stack.enter_context(mock.patch.dict(table, clear=True))
        for kernel in _kernels():
            caches: defaultdict[Any, Any] = defaultdict(functools.partial(_binder, kernel, driver))
            stack.enter_context(mock.patch.object(kernel, "device_caches", caches))
        previous = getattr(active, "_active", None)
        active.set_active(driver)
        execution.forget()
        try:
            yield driver
        finally:
            execution.forget()
            if hasattr(active, "_active"):
                active._active = previous
            else:  # Triton below 3.5
                active.reset_active()


def _kernels() -> list[Any]:
    """The package's kernels that are imported."""
    from triton import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith(__name__.split(".")[0] + ".kernels")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return list({id(kernel): kernel for kernel in found}.values())


def _binder(kernel: Any, driver: Driver) -> Any:
    made = kernel.create_binder()
    kernel.compile = driver.compile  # which `create_binder` has just set to triton.compile
    return made
