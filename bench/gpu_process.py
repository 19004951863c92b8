"""Run the child processes of `gpu_check`: a time limit, output straight to the log, a look at the progress."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent
_LOOK = 0.5  # seconds between two looks at a child's progress


def call(
    command: Sequence[str],
    limit: float,
    log: Path,
    look: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int | None, str]:
    """Run a command in the checkout: (exit code, or None if the time limit ended it; output).

    The output goes to the end of `log` while the command runs, and `look` is called every half second and at the end,
    so that a kill of this process loses neither. Whatever ends this process in Python ends the command and all that it
    started.
    """
    if limit <= 0:
        return None, ""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        began, end = file.tell(), time.monotonic() + limit
        child = subprocess.Popen(
            command, cwd=ROOT, env={**kept, **environment}, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = _wait(child, end, look)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it and all that it started have ended
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        look()
        text = log.read_bytes()[began:].decode(errors="replace")
        file.write(f"\n[{'out of time' if code is None else f'exit code {code}'}]\n".encode())
    return code, text


def _wait(child: subprocess.Popen[bytes], end: float, look: Callable[[], None]) -> int | None:
    while True:
        try:
            return child.wait(timeout=max(0.01, min(_LOOK, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            look()
            if time.monotonic() >= end:
                return None


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
