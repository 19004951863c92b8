"""Build, check and time prudent on a GPU machine without a network, in one command.

    python bench/gpu_check.py --minutes 9 --out runs/gpu   in a checkout, with only torch and triton installed
    python bench/gpu_check.py --dry                        the same on a CPU: interpreted, tiny sizes, no GPU numbers

Stages: build (the native library), machine (its ceilings and versions), tests (every op's Triton cases, and its other
tests that use the device), determinism (100 runs), graphs (CUDA-graph capture and replay), sanitizer
(compute-sanitizer, if present), timing (against eager, torch.compile and, if installed, liger-kernel and
cut-cross-entropy). Each stage runs in child processes with its own time limit, and the next stage runs even if one
fails; an op that fails a correctness stage is not timed. gpu_check.json, gpu_check.md and gpu_check.log in --out are
rewritten after each stage. If the time of one call is too short for all stages, run `--stages tests determinism graphs
sanitizer`, then `--stages timing`. The tests stage needs pytest: if the machine lacks it, bring the wheels of pytest,
pluggy and iniconfig.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _start_as_package() -> None:
    """Restart as a module if run as a script. The checkout's root is the package, whatever the folder's name: put a
    folder with a link of the right name on the path, which child processes inherit.
    """
    folder = Path(tempfile.mkdtemp(prefix="prudent-"))
    (folder / "prudent").symlink_to(ROOT, target_is_directory=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "prudent.bench.gpu_check", *sys.argv[1:]]
    try:
        code = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # removes the link, not its target
    sys.exit(code)


if __name__ == "__main__" and not __package__:
    _start_as_package()

from .gpu_goals import goals_table, markdown, verdicts  # noqa: E402

# time limit of a stage in seconds, at most the time left; timing takes all that is left
STAGES = {
    "build": 180, "machine": 90, "tests": 240, "determinism": 60, "graphs": 60, "sanitizer": 120, "timing": 3600,
}  # fmt: skip
_CARRY = "pytest is not installed, so the ops' test cases did not run: bring the wheels of pytest, pluggy and iniconfig"


class Check:
    """The run: its findings so far, written to disk after every stage."""

    def __init__(self, out: Path, dry: bool, minutes: float):
        self.out, self.dry, self.end = out, dry, time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "gpu_check.log").open("w", encoding="utf-8")
        self.failed: set[str] = set()  # ops that failed a check and are not timed
        self.cases: list[tuple[str, str]] = []  # (op, case)
        self.report: dict[str, Any] = {
            "schema": 1, "dry": dry, "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(), "machine": {}, "stages": {}, "rows": [], "goals": verdicts([]),
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        self.report["goals"] = verdicts(self.report["rows"])
        shown = without_bandwidth(self.report) if self.dry else self.report
        for name, text in (("json", json.dumps(shown, indent=1)), ("md", markdown(shown))):
            part = self.out / f"gpu_check.{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(self.out / f"gpu_check.{name}")

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, stage: str) -> None:
        """Run one stage and add its result (passed, failed or skipped) and notes to the report."""
        began = time.monotonic()
        print(f"{stage} ...", flush=True)
        try:
            status, notes = getattr(self, f"stage_{stage}")(min(STAGES[stage], self.left() - 5))
        except Exception as error:  # a fault of this script must not stop the other stages
            status, notes = "failed", [f"{type(error).__name__}: {error}"]
        seconds = time.monotonic() - began
        self.report["stages"][stage] = {"status": status, "seconds": seconds, "notes": notes}
        self.write()
        print(f"{stage}: {status} in {seconds:.0f} s" + "".join(f"\n  {note}" for note in notes), flush=True)

    def call(self, command: Sequence[str], limit: float, **environment: str) -> tuple[int | None, str]:
        """Run a command and log its output: (exit code, or None if the time limit ended it; output)."""
        if limit <= 0:
            return None, ""
        kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
        child = subprocess.Popen(
            command, cwd=ROOT, env={**kept, **environment}, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            text, code = child.communicate(timeout=limit)[0], child.returncode
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            text, code = child.communicate()[0], None
        self.log.write(f"\n$ {' '.join(command)}\n{text}\n[{'out of time' if code is None else f'exit code {code}'}]\n")
        self.log.flush()
        return code, text

    def child(self, stage: str, limit: float, before: Sequence[str] = (), *flags: str) -> tuple[int | None, Any]:
        """Run a stage of gpu_stages.py, prefixed by the command `before` if given: (exit code, its JSON file)."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            dry = ["--dry"] if self.dry else []
            command = [*before, sys.executable, "-m", "prudent.bench.gpu_stages", stage, str(file), *dry, *flags]
            code, text = self.call(command, limit)
            empty: dict[str, Any] = {"notes": [], "failed": [], "rows": []}
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else empty
        if code is None:
            found["notes"].append("out of time")
        elif code:
            found["notes"].append(f"exit code {code}: {last_line(text)}")
        return code, found

    def stage_build(self, limit: float) -> tuple[str, list[str]]:
        """Build the native library in place with setup.py, else with cmake; a dry run keeps the present library."""
        if self.dry and (ROOT / "_C.so").exists():
            return "passed", ["dry: kept the present library"]
        code, text = self.call([sys.executable, "setup.py", "build_ext", "--inplace"], limit)
        if code == 0:
            return "passed", []
        notes = [f"setup.py: {last_line(text)}"]
        found = importlib.util.find_spec("torch")
        torch = Path(str(found.origin)).parent if found else Path()
        build = str(ROOT / "build" / "gpu_check")
        configure = ["cmake", "-S", str(ROOT), "-B", build, f"-DTORCH_ROOT={torch}", f"-DCMAKE_INSTALL_PREFIX={ROOT}"]
        for step in (configure, ["cmake", "--build", build, "--parallel"], ["cmake", "--install", build]):
            code, text = self.call(step, limit) if shutil.which("cmake") else (1, "cmake is not installed")
            if code != 0:
                return "failed", [*notes, f"cmake: {last_line(text)}", "the CPU runs on the plain reference"]
        return "passed", notes

    def stage_machine(self, limit: float) -> tuple[str, list[str]]:
        code, found = self.child("describe", limit)
        self.cases = [(op, name) for op, name in found.get("cases", [])]
        self.report["machine"] = found.get("machine", {})
        return "failed" if code != 0 else "passed", found["notes"]

    def stage_tests(self, limit: float) -> tuple[str, list[str]]:
        """Run every op's Triton cases and its tests on the device; a dry run runs two of the cases under the
        interpreter.
        """
        if importlib.util.find_spec("pytest") is None:
            return "failed", [_CARRY]
        end, notes, status = time.monotonic() + limit, [], "passed"
        for op, files in test_files().items():
            wanted, environment = files, {}
            if not files or not files[0].endswith("triton_cases.py"):
                status = "failed"
                notes.append(f"{op}: no triton_cases.py to run")
                continue
            if self.dry:
                environment["TRITON_INTERPRET"] = "1"
                wanted = first_tests(files[0])
            note, fault = self.pytest(wanted, end - time.monotonic(), environment)
            notes.append(f"{op}: {note}")
            if fault:
                status = "failed"
                self.failed |= {op} if fault == "failed" else set()
        return status, notes

    def pytest(self, wanted: Sequence[str], limit: float, environment: dict[str, str]) -> tuple[str, str]:
        """Run pytest once: (its counts, and "", "failed" or "out of time")."""
        many = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") and not self.dry else []
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "junit.xml"
            code, text = self.call([*_PYTEST, *many, f"--junitxml={file}", *wanted], limit, **environment)
            if code is None:
                return "out of time", "out of time"
            if not file.exists():
                return f"exit code {code}: {last_line(text)}", "failed"
            suite = next(ElementTree.parse(file).iter("testsuite"))
        total, failed, skipped = (sum(int(suite.get(k, 0)) for k in keys) for keys in _COUNTS)
        note = f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped"
        return note, "failed" if code or total == skipped else ""

    def stage_determinism(self, limit: float) -> tuple[str, list[str]]:
        return self.correctness("determinism", limit)

    def stage_graphs(self, limit: float) -> tuple[str, list[str]]:
        return self.correctness("graphs", limit)

    def correctness(self, stage: str, limit: float) -> tuple[str, list[str]]:
        code, found = self.child(stage, limit)
        self.failed |= set(found["failed"])
        return "failed" if code != 0 or found["failed"] else "passed", found["notes"]

    def stage_sanitizer(self, limit: float) -> tuple[str, list[str]]:
        """Run memcheck (a finding fails every op) and racecheck (findings are only reported) on small shapes, without
        torch's caching allocator, which hides an access past the end of a tensor."""
        end, tool = time.monotonic() + limit, shutil.which("compute-sanitizer")
        if self.dry or tool is None:
            status, notes = self.correctness("small", limit)
            absent = "dry: without compute-sanitizer" if self.dry else "no compute-sanitizer: run without it"
            return status, [absent, *notes]
        # torch probes the driver with calls that may fail; only what a kernel does is an error here
        options = ["--report-api-errors", "no", "--error-exitcode", "9"]
        watched = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, *options]
        canary = [*watched, sys.executable, "-c", "import torch; torch.zeros(8, device='cuda').cpu()"]
        code, text = self.call(canary, limit / 3)
        if code != 0:
            return "passed", [f"compute-sanitizer does not run here: {last_line(text)}"]
        status, notes = "passed", []
        for name in ("memcheck", "racecheck"):
            code, found = self.child("small", end - time.monotonic(), [*watched, "--tool", name])
            notes += [f"{name}: {note}" for note in found["notes"]]
            if code == 9 and name == "memcheck":
                self.failed |= {op for op, _ in self.cases}
            self.failed |= set(found["failed"])
            status = "passed" if code == 0 and not found["failed"] and status == "passed" else "failed"
        return status, notes

    def stage_timing(self, limit: float) -> tuple[str, list[str]]:
        """Time the goals' cases first, then the others. If a case kills its process, name it and run the rest in a new
        process.
        """
        if not self.report["machine"]:
            return "failed", ["the machine's ceilings were not measured"]
        notes = [f"{op}: not timed, its correctness failed" for op in sorted(self.failed)]
        todo = [name for op, name in self.cases if op not in self.failed]
        end, whole = time.monotonic() + limit, True
        with tempfile.TemporaryDirectory() as folder:
            ceilings = Path(folder) / "machine.json"
            ceilings.write_text(json.dumps(self.report["machine"]), encoding="utf-8")
            seconds = "0.05" if self.dry else "2"
            while todo and end - time.monotonic() > 0:
                flags = ["--machine", str(ceilings), "--seconds", seconds, "--cases", *todo]
                code, found = self.child("timing", end - time.monotonic(), (), *flags)
                self.report["rows"] += found["rows"]
                self.write()
                done = {row["name"] for row in found["rows"]}
                running = found.get("running")
                todo = [name for name in todo if name not in done and name != running]
                if code is None:
                    todo = [running, *todo] if running else todo
                    break
                if code != 0:
                    whole = False
                    notes.append(f"{running or todo[:1]}: {found['notes'][-1]}")
                    todo = todo if running else []
        faults = [row["name"] for row in self.report["rows"] if not row["timings"]]
        notes += [f"{name}: no time, see its line" for name in faults]
        if todo:
            notes.append(f"out of time: {len(todo)} cases not measured, the first {todo[0]}")
        return "passed" if whole and not faults and not todo and not self.failed else "failed", notes


_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20")
_NAMES_DEVICE = re.compile(r"\bDEVICE\b")
_COUNTS = (("tests",), ("failures", "errors"), ("skipped",))


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


def without_bandwidth(report: dict[str, Any]) -> dict[str, Any]:
    """The report without bandwidths and shares of them, which mean nothing in a dry run on a CPU."""
    rates: dict[str, Any] = {"bandwidth": None, "matrix": {}} if report["machine"] else {}
    rows = [{**row, **dict.fromkeys(("bandwidth", "bandwidth_share", "roof_share"))} for row in report["rows"]]
    return {**report, "machine": {**report["machine"], **rates}, "rows": rows}


def first_tests(file: str, count: int = 2) -> list[str]:
    """The first tests of a file without parameters and marks, for a dry run."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    plain = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.decorator_list]
    return [f"{file}::{name}" for name in plain if name.startswith("test_")][:count]


def commit() -> str:
    """The checkout's commit, else PRUDENT_COMMIT, else "unknown": the machine may lack git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30)
        named = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        named = ""
    return named or os.environ.get("PRUDENT_COMMIT", "unknown")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing was printed"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if every stage passed, else 1. Whether the goals hold does not change it: the reader judges them."""
    flags = argparse.ArgumentParser(
        prog="prudent bench --gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the report (default %(default)s)")
    flags.add_argument("--minutes", type=float, default=9.0, help="for all of it (default %(default)s)")
    flags.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these; `machine` is always run"
    )
    flags.add_argument("--dry", action="store_true", help="on a CPU, end to end, with no GPU numbers")
    given = flags.parse_args(argv)
    if not given.minutes > 0:
        raise ValueError(f"gpu_check: minutes: expected a positive number, got {given.minutes}")
    check = Check(given.out.resolve(), given.dry, given.minutes)
    for stage in STAGES:
        if stage in given.stages or stage == "machine":
            check.run(stage)
    print(f"\n{goals_table(check.report['goals'])}\n\nwritten: {check.out}/gpu_check.json, .md and .log")
    return 0 if all(stage["status"] == "passed" for stage in check.report["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
