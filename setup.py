"""Install the packages and the native CPU library `prudent/_C.so`, which CMake and ninja build.

PRUDENT_NATIVE=0 leaves the library out; otherwise a failed build stops and says what to do. MAX_JOBS sets the number of
compile jobs, CMAKE_ARGS adds arguments to cmake.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("PRUDENT_NATIVE", "1") != "0"

HELP = """
prudent: the native CPU library was not built: {reason}.

  It needs a C++17 compiler (GCC or Clang, 10 or later), CMake, ninja and torch >= 2.10:
    Debian, Ubuntu   apt install g++            Fedora   dnf install gcc-c++
    macOS            xcode-select --install     conda    conda install -c conda-forge cxx-compiler
    and              pip install cmake ninja torch
  To go on without it, run the same command with PRUDENT_NATIVE=0 before it, such as
    PRUDENT_NATIVE=0 pip install -e .
  Then the CPU runs on the slower plain-PyTorch reference, with the same results to rounding. GPUs are not affected.
"""


def stop(reason: str) -> None:
    # SystemExit, so that pip shows these lines last, without a traceback
    raise SystemExit(HELP.format(reason=reason))


def tool(name: str) -> str:
    """The path of cmake or ninja: in this Python's environment, even if not activated, else on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        stop(f"{name} is not installed")
    return str(found)


class CMakeBuild(build_ext):
    """Configure, build and install next to the package: in the wheel's tree, or in place for an editable install."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = tool("cmake"), tool("ninja")
        torch = importlib.util.find_spec("torch")  # not imported: that takes seconds
        if torch is None or torch.origin is None:
            stop("torch is not installed where the build runs")
        folder = Path(self.build_temp).resolve() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_ROOT={Path(torch.origin).parent}",
            f"-DCMAKE_INSTALL_PREFIX={Path(self.get_ext_fullpath(ext.name)).parent.resolve()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        # an old cache names the tools of its environment, which may have been a temporary one of pip's
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        self.step("its configuration failed", configure)
        self.step("its compilation failed", [cmake, "--build", str(folder), "--parallel", jobs])
        self.step("its installation failed", [cmake, "--install", str(folder), "--strip"])

    def step(self, failure: str, command: list[str]) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, file=sys.stderr, flush=True)
        if done.returncode:
            stop(f"{failure}, see above")

    def get_ext_filename(self, fullname: str) -> str:
        # the library does not use Python, so its name has no suffix of a Python ABI
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class Modules(build_py):
    """Leave setup.py out of the package, whose folder is the repository's root."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


class AnyPythonWheel(bdist_wheel):
    """One wheel for every Python 3 of a platform (py3-none-PLATFORM)."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(
    package_dir={"prudent": "."},
    packages=["prudent", *("prudent." + p for p in find_packages(include=["kernels*", "engine*", "rlhf*", "bench*"]))],
    include_package_data=False,
    package_data={
        "prudent": ["py.typed"],
        "prudent.rlhf.report": ["*.html"],
        "prudent.rlhf.sampling": ["*.txt"],
        "prudent.rlhf.serve": ["*.html"],
    },
    ext_modules=[Extension("prudent._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": Modules, "bdist_wheel": AnyPythonWheel},
)
