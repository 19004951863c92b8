"""Compare two results of `make bench`.

    python -m prudent.bench.compare OLD.json NEW.json

A case counts as faster or slower only if the quantile ranges (0.2 to 0.8) of the two runs do not overlap. The table
also shows each run's ratio to eager, which is comparable across machines, unlike the times. The exit code is 0, or 2
with one sentence if a file cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..rlhf.report.words import aligned
from .machine import Machine
from .measure import Row, Timing
from .report import load, seconds, state

_COLUMNS = ("case", "old", "new", "new / old", "", "eager: old", "new")


def verdict(old: Timing, new: Timing) -> str:
    """ "faster", "slower", or "" if the ranges overlap."""
    if new.q80 < old.q20:
        return "faster"
    return "slower" if new.q20 > old.q80 else ""


def table(old: tuple[list[Row], Machine], new: tuple[list[Row], Machine]) -> str:
    """The comparison as text: cases in the new file's order, then the cases that only the old file has."""
    (before, old_machine), (after, new_machine) = old, new
    by_name = {row.name: row for row in before}
    lines = [_cells(by_name.pop(row.name, None), row) for row in after]
    lines += [_cells(row, None) for row in by_name.values()]
    text = [f"old: {_origin(old_machine)}", f"new: {_origin(new_machine)}"]
    if not old_machine.same_as(new_machine):
        text.append("The machines differ: the times say nothing about the code; the ratios to eager say a little.")
    text += ["", aligned([_COLUMNS, *lines], left=(0, 4))]
    marks = [cells[4] for cells in lines]
    text += ["", f"{marks.count('faster')} faster, {marks.count('slower')} slower, of {len(lines)} cases"]
    return "\n".join(text)


def _origin(machine: Machine) -> str:
    changed = " with changes" if machine.dirty else ""
    return f"{machine.commit[:12]}{changed}, {machine.date}, {machine.name}, {machine.threads} threads"


def _cells(old: Row | None, new: Row | None) -> tuple[str, ...]:
    either = new or old
    assert either is not None
    a, b = (row.timings.get("ours") if row else None for row in (old, new))
    shown = [seconds(t.median) if t else state(row) if row else "absent" for row, t in ((old, a), (new, b))]
    ratios = [f"{r:.2f}x" if row and (r := row.ratio("eager")) is not None else "-" for row in (old, new)]
    if a is None or b is None:
        return either.name, *shown, "-", "", *ratios
    return either.name, *shown, f"{b.median / a.median:.2f}", verdict(a, b), *ratios


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m prudent.bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD", help="JSON file of an earlier `make bench`")
    parser.add_argument("new", metavar="NEW", help="JSON file of a later one")
    arguments = parser.parse_args(argv)
    try:
        print(table(load(arguments.old), load(arguments.new)))
    except ValueError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
