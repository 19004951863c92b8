"""Count the bytes that the Triton kernels read and write, and compare them with the least possible.

    prudent bench --traffic [--op ensemble_reward ...] [--json]

The kernels run under Triton's interpreter on small shapes, in a child process. Every load and store is counted for the
argument whose memory it touches: all bytes, and distinct bytes. Per-row tensors must cross device memory; reading or
writing each once is the minimum, called the floor here. Each block of rows reads a shared tensor (a weight) again; it
is small enough to come from cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from .traffic_count import Report


def table(reports: Sequence[Report]) -> str:
    """One block per call: the tensors of its launches, then bytes per row and the floor."""
    lines = []
    for report in reports:
        lines.append(f"{report.op}, {report.mode}")
        lines.append(f"  {'launch':<18}{'tensor':<18}{'shape':<16}{'read':>10}{'times':>8}{'written':>10}{'times':>8}")
        for access in report.accesses:
            if not access.read and not access.written:
                continue
            shape = " x ".join(map(str, access.shape)) or "scalar"
            read = f"{access.read:>10,}{_times(access.read, access.distinct_read):>8}"
            written = f"{access.written:>10,}{_times(access.written, access.distinct_written):>8}"
            shared = "" if report.has_rows(access) else "   shared by the rows"
            lines.append(f"  {access.kernel:<18}{access.tensor:<18}{shape:<16}{read}{written}{shared}")
        asked, distinct, floor = report.asked(), report.distinct(), report.floor
        lines.append(
            f"  bytes a row: {asked:,.0f} asked for ({asked / floor:.2f} of the floor), {distinct:,.0f} distinct "
            f"in each launch ({distinct / floor:.2f}), {floor:,.0f} floor\n"
        )
    return "\n".join(lines)


def _times(asked: int, distinct: int) -> str:
    return f"{asked / distinct:.2f}" if distinct else "-"


def parser() -> argparse.ArgumentParser:
    """The flags of `prudent bench --traffic`."""
    flags = argparse.ArgumentParser(
        prog="prudent bench --traffic",
        description="Count the bytes that the Triton kernels load and store, under the interpreter, without a GPU.",
    )
    flags.add_argument("--op", nargs="+", metavar="OP", default=[], help="default: all")
    flags.add_argument("--json", action="store_true", help="print every count as JSON")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, in a child process if needed: the interpreter must be on when triton is imported."""
    given = parser().parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        raise ImportError("bench --traffic: triton is needed: pip install 'prudent[test]'")
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", __spec__.name, *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    from .traffic_cases import CASES

    unknown = sorted(set(given.op) - {op for op, _ in CASES})
    if unknown:
        raise ValueError(
            f"bench --traffic: op: expected one of {', '.join(sorted({op for op, _ in CASES}))}, got {unknown[0]!r}"
        )
    reports = [run(op, mode) for (op, mode), run in CASES.items() if not given.op or op in given.op]
    print(json.dumps([asdict(report) for report in reports], indent=1) if given.json else table(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
