"""Triton's own launcher in C on a machine without a GPU, over a libcuda that does nothing and counts.

`StubDriver` is a `Driver` (fake_driver.py) whose kernels start through Triton's launcher in Python and C, which unpacks
the arguments and calls the driver: the host's whole work up to the driver's launch can then be timed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .fake_driver import Driver

_NOTHING = (
    "cuCtxGetDevice", "cuCtxGetLimit", "cuCtxSetCurrent", "cuCtxSetLimit",
    "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDriverGetVersion",
    "cuFuncGetAttribute", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuGetErrorString",
    "cuInit", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload",
    "cuOccupancyMaxActiveClusters", "cuPointerGetAttributes", "cuStreamIsCapturing", "cuTensorMapEncodeIm2col",
    "cuTensorMapEncodeTiled",
)  # fmt: skip
# what Triton's driver.c needs of libcuda: a context, the address of a pointer as it is, and the launch, which counts
_SOURCE = """
#include <stdint.h>
static long launches;
long stub_launches(void) { return launches; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
int cuLaunchKernelEx(void) { launches++; return 0; }
int cuLaunchKernel(void) { launches++; return 0; }
""" + "".join(f"int {name}(void) {{ return 0; }}\n" for name in _NOTHING)


class StubDriver(Driver):
    """Builds the library and Triton's C launcher in `folder`, seconds. It serves the rest of the process.

    ValueError if torch has a GPU: its libcuda is loaded, and a stub's kernel must not reach it. CalledProcessError or
    FileNotFoundError without a C compiler.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        if torch.cuda.is_available():
            raise ValueError("StubDriver: expected a machine without a GPU, got one that torch can use")
        library, source = folder / "libcuda.so.1", folder / "stub.c"
        source.write_text(_SOURCE)
        command = ["cc", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        (folder / "libcuda.so").symlink_to(library)  # the name that Triton 3.4 links with
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its name when Triton asks for it
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")  # what is linked to the stub must not be found later
        from triton.backends.nvidia.driver import CudaUtils

        self.utils = CudaUtils()

    @property
    def launches(self) -> int:
        """How often the driver's launch was called."""
        return int(self._library.stub_launches())

    def compile(self, source: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
        """As `Driver.compile`, with Triton's launcher to start it."""
        import triton
        from triton.backends.nvidia.driver import CudaLauncher

        compiled = super().compile(source, target, options, **others)
        metadata = SimpleNamespace(
            num_ctas=1, cluster_dims=(1, 1, 1), global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
            profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False, tensordesc_meta=None,
            instrumentation_mode="",
        )  # fmt: skip
        compiled.run = CudaLauncher(source, metadata)
        clusters = (1, 1, 1) if triton.__version__.split(".")[:2] < ["3", "6"] else ()
        compiled.packed_metadata = (options["num_warps"], 1, 0, *clusters)  # warps, programs a cluster, shared memory
        return compiled
