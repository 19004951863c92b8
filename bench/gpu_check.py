"""Check and time prudent on a GPU machine without a network; bench/gpu.sh has the two calls for a short lease.

    python bench/gpu_check.py --goals-only --minutes 5     in a checkout, with only torch, triton and transformers
    python bench/gpu_check.py --dry                        all stages on a CPU: interpreted, tiny sizes, no GPU numbers

Stages: build (the native library, which the CPU uses), goals (the cases of the goals, the forward with norm first, and
again with torch's max-autotune and other libraries' ops), determinism (100 runs), graphs (CUDA-graph capture and
replay), tests (every op's Triton cases and its other tests that use the device), sanitizer (compute-sanitizer, if
present), ppo (bench/ppo_gpu.py), timing (all other cases). Every timed case is first checked against fp64. An op that
fails determinism or graphs is left out of timing; a failed test or sanitizer is only reported.

Each stage runs in child processes with its own time limit, and the next stage runs even if one fails.
gpu_check.json and .md in --out are rewritten after each case, and gpu_check.log grows as it is printed, so that a run
that is killed loses only the case under way.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # removes the link, not its target
    sys.exit(code)


if __name__ == "__main__" and not __package__:
    _start_as_package()

from . import gpu_process, gpu_tests  # noqa: E402
from .gpu_goals import goals_table, markdown, verdicts  # noqa: E402
from .gpu_process import commit, last_line  # noqa: E402

# time limit of a stage in seconds, at most the time left, or this share of it
SHARES = {"tests": 0.4, "ppo": 0.6}
STAGES = {
    "build": 180, "goals": 3600, "determinism": 60, "graphs": 60, "tests": 600, "sanitizer": 120, "ppo": 900,
    "timing": 3600,
}  # fmt: skip


class Check:
    """The run: its findings so far, written to disk after every stage and every timed case."""

    def __init__(self, out: Path, dry: bool, minutes: float):
        self.out, self.dry, self.end = out, dry, time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "gpu_check.log"
        self.log.write_bytes(b"")
        self.unsteady: set[str] = set()  # ops that failed determinism or graphs and are left out of timing
        self.rows: dict[str, dict[str, Any]] = {}  # name of a case -> its latest row with times
        self.report: dict[str, Any] = {
            "schema": 1, "dry": dry, "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(), "machine": {}, "stages": {}, "rows": [], "goals": verdicts([]),
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        self.report["rows"] = list(self.rows.values())
        self.report["goals"] = verdicts(self.report["rows"])
        shown = without_bandwidth(self.report) if self.dry else self.report
        for name, text in (("json", json.dumps(shown, indent=1)), ("md", markdown(shown))):
            part = self.out / f"gpu_check.{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(self.out / f"gpu_check.{name}")

    def left(self) -> float:
        return self.end - time.monotonic()

    def limit(self, stage: str) -> float:
        return min(STAGES[stage], SHARES.get(stage, 1.0) * (self.left() - 5))

    def run(self, stage: str) -> None:
        """Run one stage and add its result (passed, failed or skipped) and notes to the report."""
        began = time.monotonic()
        print(f"{stage} ...", flush=True)
        try:
            status, notes = getattr(self, f"stage_{stage}")(self.limit(stage))
        except Exception as error:  # a fault of this script must not stop the other stages
            status, notes = "failed", [f"{type(error).__name__}: {error}"]
        seconds = time.monotonic() - began
        self.report["stages"][stage] = {"status": status, "seconds": seconds, "notes": notes}
        self.write()
        print(f"{stage}: {status} in {seconds:.0f} s" + "".join(f"\n  {note}" for note in notes), flush=True)

    def call(self, command: Sequence[str], limit: float, look: Callable[[], None] = lambda: None) -> Any:
        return gpu_process.call(command, limit, self.log, look)

    def child(self, stage: str, limit: float, before: Sequence[str] = (), *flags: str) -> tuple[int | None, Any]:
        """Run a stage of gpu_stages.py, prefixed by the command `before` if given: (exit code, its JSON file). While it
        runs, its rows go to the report.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            dry = ["--dry"] if self.dry else []
            command = [*before, sys.executable, "-m", "prudent.bench.gpu_stages", stage, str(file), *dry, *flags]
            found: dict[str, Any] = {"notes": [], "failed": [], "rows": []}
            seen = ""

            def look() -> None:
                nonlocal seen
                if file.exists() and (text := file.read_text(encoding="utf-8")) != seen:
                    seen = text
                    found.update(json.loads(text))
                    self.add(found)

            code, text = self.call(command, limit, look)
        if code is None:
            found["notes"].append("out of time")
        elif code:
            found["notes"].append(f"exit code {code}: {last_line(text)}")
        return code, found

    def add(self, found: dict[str, Any]) -> None:
        """Take the machine and the rows of a child. A row without times does not replace one with times."""
        self.report["machine"] = self.report["machine"] or found.get("machine", {})
        for row in found["rows"]:
            before = self.rows.get(row["name"])
            if row["timings"] or before is None or not before["timings"]:
                self.rows[row["name"]] = row
        if found["rows"] or found.get("machine"):
            self.write()

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

    def stage_goals(self, limit: float) -> tuple[str, list[str]]:
        return self.timed("goals", limit)

    def stage_determinism(self, limit: float) -> tuple[str, list[str]]:
        return self.correctness("determinism", limit)

    def stage_graphs(self, limit: float) -> tuple[str, list[str]]:
        return self.correctness("graphs", limit)

    def correctness(self, stage: str, limit: float) -> tuple[str, list[str]]:
        code, found = self.child(stage, limit)
        self.unsteady |= set(found["failed"])
        return "failed" if code != 0 or found["failed"] else "passed", found["notes"]

    def stage_tests(self, limit: float) -> tuple[str, list[str]]:
        return gpu_tests.run(limit, self.log, self.dry)

    def stage_sanitizer(self, limit: float) -> tuple[str, list[str]]:
        """Run memcheck and racecheck on small shapes, without torch's caching allocator, which hides an access past the
        end of a tensor. torch probes the driver with calls that may fail, so failed calls are no finding.
        """
        end, tool = time.monotonic() + limit, shutil.which("compute-sanitizer")
        if self.dry or tool is None:
            code, found = self.child("small", limit)
            absent = "dry: without compute-sanitizer" if self.dry else "no compute-sanitizer: run without it"
            return "failed" if code != 0 or found["failed"] else "passed", [absent, *found["notes"]]
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
            status = status if code == 0 and not found["failed"] else "failed"
        return status, notes

    def stage_ppo(self, limit: float) -> tuple[str, list[str]]:
        """Run bench/ppo_gpu.py, which writes its own report to --out after each part."""
        dry = ["--dry", "--parts", "8b"] if self.dry else ["--minutes", f"{limit / 60:.2f}"]
        code, text = self.call([sys.executable, "-m", "prudent.bench.ppo_gpu", "--out", str(self.out), *dry], limit)
        said = {None: "out of time", 0: "see ppo_gpu.md"}.get(code, f"exit code {code}: {last_line(text)}")
        return "passed" if code == 0 else "failed", [said]

    def stage_timing(self, limit: float) -> tuple[str, list[str]]:
        return self.timed("timing", limit)

    def timed(self, stage: str, limit: float) -> tuple[str, list[str]]:
        """Time the stage's cases. If a case ends its process, name it and time the rest in a new process."""
        without = sorted(self.unsteady) if stage == "timing" else []
        notes = [f"{op}: not timed, it failed determinism or graphs" for op in without]
        end, whole = time.monotonic() + limit, not without
        skip: list[str] = []
        names: set[str] = set()
        while True:
            flags = ["--skip", *skip, "--without", *without]
            code, found = self.child(stage, end - time.monotonic(), (), *flags)
            names |= {row["name"] for row in found["rows"]}
            running, done = found.get("running"), found.get("done", [])
            left = [key for _, key in found.get("todo", []) if key not in done]
            if code == 0:
                break
            whole = False
            if code is None or running is None:  # no time, or a fault outside the cases, which would come again
                first = f": {len(left)} cases not measured, the first {left[0]}" if left else ""
                notes.append(found["notes"][-1] + first)
                break
            notes.append(f"{running}: {found['notes'][-1]}")
            skip += [*done, running]
        faults = [name for name in sorted(names) if not self.rows[name]["timings"]]
        notes += [f"{name}: no time, see its line" for name in faults]
        return "passed" if whole and not faults else "failed", notes


def without_bandwidth(report: dict[str, Any]) -> dict[str, Any]:
    """The report without bandwidths and shares of them, which mean nothing in a dry run on a CPU."""
    rates: dict[str, Any] = {"bandwidth": None, "matrix": {}} if report["machine"] else {}
    rows = [{**row, **dict.fromkeys(("bandwidth", "bandwidth_share", "roof_share"))} for row in report["rows"]]
    return {**report, "machine": {**report["machine"], **rates}, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if every stage passed, else 1. Whether the goals hold does not change it: the reader judges them."""
    flags = argparse.ArgumentParser(
        prog="prudent bench --gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the report (default %(default)s)")
    flags.add_argument("--minutes", type=float, default=60.0, help="for all of it (default %(default)s)")
    which = flags.add_mutually_exclusive_group()
    which.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these (default: all)")
    which.add_argument("--goals-only", action="store_true", help="only the goals: no build, no tests")
    which.add_argument(
        "--readme", action="store_true", help="measure nothing: fill the README's tables from bench/results/gpu_*.json"
    )
    flags.add_argument("--dry", action="store_true", help="on a CPU, end to end, with no GPU numbers")
    given = flags.parse_args(argv)
    if not given.minutes > 0:
        raise ValueError(f"gpu_check: minutes: expected a positive number, got {given.minutes}")
    if given.readme:
        from .gpu_readme import write  # it needs torch

        print(write())
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the children too
    check = Check(given.out.resolve(), given.dry, given.minutes)
    for stage in STAGES:
        if stage in (["goals"] if given.goals_only else given.stages):
            check.run(stage)
    print(f"\n{goals_table(check.report['goals'])}\n\nwritten: {check.out}/gpu_check.json, .md and .log")
    return 0 if all(stage["status"] == "passed" for stage in check.report["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
