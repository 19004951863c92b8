"""Write the rows of a benchmark as a terminal table, Markdown, CSV and JSON; load the JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..rlhf.job.files import atomic_write_json, atomic_write_text
from ..rlhf.report.words import aligned, markdown_table
from .case import Check
from .cases import CASES
from .machine import Machine
from .measure import Row, Timing

SCHEMA = 1
_COLUMNS = ("shape", "dtype", "time", "±", "bytes", "read", "roof", "eager", "compile", "memory", "eager's", "beside")
_CSV = (
    "op", "mode", "shape", "dtype", "device", "variant", "check", "seconds", "q20", "q80", "rounds", "iterations",
    "bytes_moved", "flops", "bandwidth_share", "times_ours", "extra_peak_bytes", "host_seconds",
    "graph_seconds", "commit", "dirty", "machine", "threads", "date", "torch",
)  # fmt: skip
_DERIVED = ("ratio", "bandwidth_share", "roof_share")  # of a row's JSON
_OWN_COLUMN = ("ours", "eager", "compiled")
CAPTION = (
    "time: median of ours, ± half the distance between its quantiles 0.2 and 0.8. bytes: the minimum, every input of a "
    "pass read once and every output written once. read: the time of that minimum at the measured read bandwidth, as a "
    "share of ours. roof: the same, with the operations at the measured matrix rate if that takes longer. eager, "
    "compile, beside: their time as a multiple of ours. memory: extra peak of one call. On a GPU, time is the "
    "device's; host: until our call returns, graph: the replay of our call as a CUDA graph."
)


def write(rows: Sequence[Row], machine: Machine, folder: Path | str, stem: str | None = None) -> list[Path]:
    """Write STEM.json, .csv and .md into `folder`, and the roofline if matplotlib is installed. Returns the paths.

    stem: by default "ops-cpu" or "ops-cuda", by the device.
    """
    folder, stem = Path(folder), stem or f"ops-{machine.device}"
    written = [folder / f"{stem}.{ending}" for ending in ("json", "csv", "md")]
    atomic_write_json(written[0], to_json(rows, machine))
    atomic_write_text(written[1], to_csv(rows, machine))
    atomic_write_text(written[2], markdown(rows, machine, f"{stem}-roofline.png"))
    from .roofline import draw

    try:
        written += draw(rows, machine, folder / f"{stem}-roofline")
    except ImportError:
        atomic_write_text(written[2], markdown(rows, machine, None))
    return written


def to_json(rows: Sequence[Row], machine: Machine) -> dict[str, Any]:
    """{schema, machine, rows}; rows have ratios and bandwidth shares, but not their samples."""
    listed = []
    for row in rows:
        fields = asdict(row)
        del fields["samples"]
        fields["check"] = None if row.check is None else _finite(row.check)
        fields["ratio"] = {name: row.ratio(name) for name in row.timings if name != "ours"}
        fields["bandwidth_share"] = row.share()
        fields["roof_share"] = row.roof_share(machine.matrix[row.dtype])
        listed.append(fields)
    return {"schema": SCHEMA, "machine": asdict(machine), "rows": listed}


def _finite(check: Check) -> dict[str, Any]:
    """The check with None for infinite values, because JSON has no infinity."""
    return {
        k: None if isinstance(v, float) and v in (float("inf"), float("-inf")) else v
        for k, v in check._asdict().items()
    }


def load(path: Path | str) -> tuple[list[Row], Machine]:
    """Read a JSON file of `write`; ValueError for any other file."""
    expected = "expected the JSON file of a `make bench`"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: {expected}, found no file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {expected}, got something else ({error})") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        got = found.get("schema") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: {expected} with schema {SCHEMA}, got {got}")
    try:
        return [_row(fields) for fields in found["rows"]], Machine(**found["machine"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {expected}, got one with other fields ({type(error).__name__}: {error})") from None


def merged(path: Path, rows: Sequence[Row], machine: Machine) -> tuple[list[Row], Machine]:
    """These rows and the rows of `path` that they do not replace, in the cases' order, with the higher ceilings.

    If there is no file, only these rows. ValueError if the file is from another commit or kind of machine.
    """
    if not path.exists():
        return list(rows), machine
    before, then = load(path)
    if then.commit != machine.commit or not then.same_as(machine):
        expected = f"commit {machine.commit[:12]} and this machine"
        raise ValueError(f"{path}: expected results of {expected} to add to, got {then.commit[:12]}, {then.name}")
    by_name = {row.name: row for row in (*before, *rows)}
    order = [case.name for case in CASES if case.name in by_name]
    highest = {name: max(rate, then.matrix[name]) for name, rate in machine.matrix.items()}
    both = replace(machine, bandwidth=max(machine.bandwidth, then.bandwidth), matrix=highest)
    return [by_name[name] for name in dict.fromkeys([*order, *by_name])], replace(
        both, dirty=machine.dirty or then.dirty
    )


def _row(fields: dict[str, Any]) -> Row:
    kept = {k: v for k, v in fields.items() if k not in ("check", "timings", *_DERIVED)}
    check = fields["check"]
    if check is not None:
        check = Check._make(float("inf") if check[k] is None else check[k] for k in Check._fields)
    timings = {name: Timing(**timing) for name, timing in fields["timings"].items()}
    return Row(**kept, check=check, timings=timings)


def to_csv(rows: Sequence[Row], machine: Machine) -> str:
    """CSV with one line per variant of a case; every line names its commit and machine."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(_CSV)
    tail = [machine.commit, machine.dirty, machine.name, machine.threads, machine.date, machine.versions.get("torch")]
    for row in rows:
        head = [row.op, row.mode, row.shape, row.dtype, row.device]
        for name in row.timings or ["ours"]:
            t = row.timings.get(name)
            times = [t.median, t.q20, t.q80, t.rounds, t.iterations] if t else [""] * 5
            share = row.share() if name == "ours" else None
            derived = [row.bytes_moved, row.flops, share, row.ratio(name), row.memory.get(name)]
            derived += [row.host.get(name), row.graph.get(name)]
            out.writerow([*head, name, state(row), *times, *derived, *tail])
    return text.getvalue()


def state(row: Row) -> str:
    """ "passed", "check failed" or "not measured"; the table shows it if there are no times."""
    if row.check is None or (row.passed and not row.timings):
        return "not measured"
    return "passed" if row.passed else "check failed"


def table(rows: Sequence[Row], machine: Machine) -> str:
    """The table for the terminal: one block for each op and mode, with aligned columns."""
    blank = [""] * (len(_COLUMNS) - 1)
    cells: list[Sequence[str]] = [_COLUMNS]
    titles: dict[int, str] = {}  # line number -> the block that it belongs to
    for row in rows:
        titles[len(cells)] = f"{row.op}: {row.mode}"
        *most, beside = _padded(_cells(row, machine))
        first, *others = beside.split(", ")
        cells += [(*most, first), *((*blank, other) for other in others)]
    head, *body = aligned(cells, left=(0, 1, len(_COLUMNS) - 1)).split("\n")
    text, block = [*headline(machine), "", f"  {head}"], ""
    for number, line in enumerate(body, start=1):
        if titles.get(number, block) != block:
            block = titles[number]
            text.append(block)
        text.append(f"  {line}")
    return "\n".join([*text, *(f"  {note}" for note in _notes(rows))])


def _padded(cells: list[str]) -> list[str]:
    """The cells of a row, padded to all columns if the row has no times."""
    return [*cells, *[""] * (len(_COLUMNS) - len(cells))]


def _cells(row: Row, machine: Machine) -> list[str]:
    if "ours" not in row.timings:
        return [row.shape, row.dtype, state(row)]
    ours = row.timings["ours"]
    beside = [f"{name} {_times(row.ratio(name))}" for name in row.timings if name not in _OWN_COLUMN]
    beside += [
        f"{name} {seconds(of['ours'])}" for name, of in (("host", row.host), ("graph", row.graph)) if "ours" in of
    ]
    return [
        row.shape,
        row.dtype,
        seconds(ours.median),
        f"{(ours.q80 - ours.q20) / 2 / ours.median:.0%}",
        size(row.bytes_moved),
        f"{row.share():.0%}",
        f"{row.roof_share(machine.matrix[row.dtype]):.0%}",
        _times(row.ratio("eager")),
        _times(row.ratio("compiled")),
        size(row.memory.get("ours")),
        size(row.memory.get("eager")),
        ", ".join(beside),
    ]


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.check is not None and not row.check.passed:
            c = row.check
            yield f"{row.name}: {c.output} is {c.error:.3g} from fp64; eager {c.eager_error:.3g}, allowed {c.bound:.3g}"
        yield from (f"{row.name}: {note}" for note in row.notes)


def headline(machine: Machine) -> list[str]:
    """Two lines: the machine, and the code."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in machine.matrix.items())
    kind = (
        f"{machine.cores} multiprocessors" if machine.device == "cuda" else f"{machine.threads} threads, {machine.isa}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    changed = " with changes" if machine.dirty else ""
    return [
        f"{machine.name}, {kind}; reads {machine.bandwidth / 1e9:.1f} GB/s; multiplies {rates} GFLOP/s",
        f"commit {machine.commit[:12]}{changed}, {machine.date}; {versions}",
    ]


def markdown(rows: Sequence[Row], machine: Machine, picture: str | None) -> str:
    """The table as a Markdown page, with an explanation of its columns."""
    lines = [f"# The ops on {machine.name}", "", *headline(machine), "", CAPTION, ""]
    body = [[f"{row.op}: {row.mode}", *_padded(_cells(row, machine))] for row in rows]
    lines += markdown_table([["op", *_COLUMNS], *body])
    notes = [f"- {note}" for note in _notes(rows)]
    lines += ["", *notes, ""] if notes else [""]
    return "\n".join([*lines, *([f"![roofline]({picture})", ""] if picture else [])])


def seconds(value: float) -> str:
    """Seconds as three digits and a unit: 41.2 us, 2.31 ms, 1.20 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            return f"{_three(value * factor)} {unit}"
    raise AssertionError


def size(value: float | None) -> str:
    """Bytes as three digits and a decimal unit; "-" for None."""
    if value is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f} B"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{_three(ratio)}x"


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
