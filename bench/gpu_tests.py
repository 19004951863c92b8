"""Run the tests of the ops that use the device, for `gpu_check`: every Triton case, and each file that names DEVICE."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from .gpu_process import ROOT, call, last_line

NO_PYTEST = "pytest is not installed, so the ops' tests did not run: bring the wheels of pytest, pluggy and iniconfig"
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20")
_NAMES_DEVICE = re.compile(r"\bDEVICE\b")
_COUNTS = (("tests",), ("failures", "errors"), ("skipped",))


def run(limit: float, log: Path, dry: bool) -> tuple[str, list[str]]:
    """("passed" or "failed", a note for each op); a dry run runs two cases of each op under the interpreter."""
    if importlib.util.find_spec("pytest") is None:
        return "failed", [NO_PYTEST]
    end, notes, status = time.monotonic() + limit, [], "passed"
    for op, files in test_files().items():
        wanted = first_tests(files[0]) if dry else files
        note, passed = _pytest(wanted, end - time.monotonic(), log, dry)
        notes.append(f"{op}: {note}")
        status = status if passed else "failed"
    return status, notes


def _pytest(wanted: Sequence[str], limit: float, log: Path, dry: bool) -> tuple[str, bool]:
    """Run pytest once: (its counts, whether all passed)."""
    many = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") and not dry else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        environment = {"TRITON_INTERPRET": "1"} if dry else {}
        code, text = call([*_PYTEST, *many, f"--junitxml={file}", *wanted], limit, log, environment=environment)
        if code is None:
            return "out of time", False
        if not file.exists():
            return f"exit code {code}: {last_line(text)}", False
        suite = next(ElementTree.parse(file).iter("testsuite"))
    total, failed, skipped = (sum(int(suite.get(k, 0)) for k in keys) for keys in _COUNTS)
    note = f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped"
    return note, code == 0 and total > skipped


def test_files() -> dict[str, list[str]]:
    """op -> its test files, as paths in the checkout: the Triton cases first, then the op tests and the other files of
    its folder that use DEVICE (the GPU if there is one).
    """
    kernels = ROOT / "tests" / "kernels"
    found = {}
    for op in sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py")):
        files = [*sorted((kernels / op).glob("triton*_cases.py")), kernels / op / "test_op.py"]
        tests = sorted((kernels / op).glob("test_*.py"))
        files += [file for file in tests if file not in files and _NAMES_DEVICE.search(file.read_text("utf-8"))]
        found[op] = [str(file.relative_to(ROOT)) for file in files]
    return found


def first_tests(file: str, count: int = 2) -> list[str]:
    """The first tests of a file without parameters and marks, for a dry run."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    plain = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.decorator_list]
    return [f"{file}::{name}" for name in plain if name.startswith("test_")][:count]
