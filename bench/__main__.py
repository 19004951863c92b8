"""Run the microbenchmarks without pytest: every op against eager and torch.compile in one run.

It prints a table and writes ops-DEVICE.json, .csv, .md and a roofline to --out. A case that fails its check against
fp64 is not timed, and the exit code is 1. `make bench` runs the same under pytest-benchmark; `python -m
prudent.bench.compare` compares two results.

examples:
  prudent bench                                  every op at this device's sizes, minutes
  prudent bench --size smoke --out runs/smoke    a quick check that everything runs, seconds a case
  prudent bench --op ensemble_reward --dtype bf16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import cases, machine, measure, report
from .case import DTYPES, SIZES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prudent bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="smoke: tiny; small: minutes on two cores (the CPU's default); "
                        "full: small and the shapes of the goals (a GPU's default)")  # fmt: skip
    parser.add_argument("--op", action="append", default=[], choices=cases.ops(), help="only this op; repeatable")
    parser.add_argument(
        "--dtype", action="append", default=[], choices=tuple(DTYPES), help="only this type; repeatable"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name (see --list) contains TEXT")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results (default %(default)s)"
    )
    parser.add_argument("--add", action="store_true", help="add to the rows that --out has from this commit")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    size = arguments.size or cases.default_size(arguments.device)
    chosen = cases.select(arguments.device, size, arguments.op)
    chosen = [case for case in chosen if not arguments.dtype or case.dtype in arguments.dtype]
    chosen = [case for case in chosen if arguments.case in case.name]
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        given = (("op", arguments.op), ("dtype", arguments.dtype))
        asked = [f"--{name} {' '.join(value)}" for name, value in given if value]
        asked += [f"--case {arguments.case!r}"] if arguments.case else []
        print(f"bench: error: no case of size {size} has {' and '.join(asked)}; --list names them", file=sys.stderr)
        return 2
    here = machine.describe(arguments.device, quick=size == "smoke")
    earlier = arguments.out / f"ops-{arguments.device}.json"
    try:
        if arguments.add:
            report.merged(earlier, [], here)  # refuse an unusable OUT before minutes of measuring
    except ValueError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    rows = measure.run(chosen, arguments.device, size, progress=not arguments.quiet)
    here = machine.again(here, [row.bandwidth for row in rows], quick=size == "smoke")
    if arguments.add:
        rows, here = report.merged(earlier, rows, here)
    print(report.table(rows, here))
    written = report.write(rows, here, arguments.out)
    print(f"\nwritten: {', '.join(str(path) for path in written)}")
    return int(any(row.check is not None and not row.check.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
