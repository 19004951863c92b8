"""The bytes that the Triton kernels ask for, counted from the kernels themselves, against the floor.

    prudent bench --traffic [--op ensemble_reward ...] [--json]

The kernels run under Triton's interpreter on small shapes, in a process of its own, and every load and store is counted
by the argument it falls in: the bytes asked for, and the distinct ones. What has a row for each row of the call must
come from and go to device memory; asked for once it is at its floor, whatever the shape. What all rows share (a weight)
is asked for again by each block of rows, and is small enough to come from cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

# of the interpreter's builder: place of the pointers among the arguments, of the mask, and whether it reads and writes
_COUNTED: dict[str, tuple[int, int | None, bool, bool]] = {
    "create_masked_load": (0, 1, True, False),
    "create_masked_store": (0, 2, False, True),
    "create_atomic_rmw": (1, 3, True, True),
    "create_atomic_cas": (0, None, True, True),
}


@dataclass
class Access:
    """Bytes of one argument of one launch that were asked for, and the distinct ones among them."""

    kernel: str
    tensor: str
    shape: tuple[int, ...]
    read: int = 0
    distinct_read: int = 0
    written: int = 0
    distinct_written: int = 0


class _Region:
    """The memory of one argument, and which of its elements a launch has touched."""

    def __init__(self, kernel: str, name: str, value: torch.Tensor):
        self.access, self.itemsize = Access(kernel, name, tuple(value.shape)), value.element_size()
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        self.start, self.end = value.data_ptr(), value.data_ptr() + span * self.itemsize
        self.reads, self.writes = np.zeros(span, bool), np.zeros(span, bool)

    def count(self, addresses: Any, reads: bool, writes: bool) -> None:
        places = (addresses - self.start) // self.itemsize
        if reads:
            self.reads[places] = True
            self.access.read += places.size * self.itemsize
        if writes:
            self.writes[places] = True
            self.access.written += places.size * self.itemsize

    def close(self) -> Access:
        self.access.distinct_read = int(self.reads.sum()) * self.itemsize
        self.access.distinct_written = int(self.writes.sum()) * self.itemsize
        return self.access


@contextlib.contextmanager
def counting() -> Iterator[list[Access]]:
    """Inside the block every interpreted launch is counted: the list gets one Access for each tensor it was given."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    missing = [name for name in _COUNTED if not hasattr(builder, name)]
    if missing:
        raise ImportError(f"bench --traffic: this triton's interpreter has no {', '.join(missing)} to count")
    found: list[Access] = []
    regions: list[_Region] = []
    originals = {name: getattr(builder, name) for name in _COUNTED}
    run = executor.__call__

    def wrapped(name: str) -> Any:
        pointers, mask, reads, writes = _COUNTED[name]

        def counted(self: Any, *arguments: Any, **named: Any) -> Any:
            addresses = np.asarray(arguments[pointers].data)
            wanted = np.ones(addresses.shape, bool) if mask is None else np.asarray(arguments[mask].data).astype(bool)
            left = np.broadcast_to(addresses, wanted.shape)[wanted].astype(np.int64)
            for region in regions:
                inside = (left >= region.start) & (left < region.end)
                if inside.any():
                    region.count(left[inside], reads, writes)
                    left = left[~inside]
            if left.size:
                raise RuntimeError(f"bench --traffic: {name}: {left.size} addresses outside every argument")
            return originals[name](self, *arguments, **named)

        return counted

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        values = {**dict(zip(self.arg_names, arguments, strict=False)), **named}
        tensors = {k: v for k, v in values.items() if k in self.arg_names and isinstance(v, torch.Tensor) and v.numel()}
        kernel = str(self.fn.__name__).removesuffix("_kernel")
        regions[:] = [_Region(kernel, name, value) for name, value in tensors.items()]
        run(self, *arguments, **named)
        found.extend(region.close() for region in regions)

    try:
        for name in _COUNTED:
            setattr(builder, name, wrapped(name))
        executor.__call__ = launched
        yield found
    finally:
        for name, original in originals.items():
            setattr(builder, name, original)
        executor.__call__ = run


@dataclass
class Report:
    """One call of an op. `rows`: the sizes that mark a tensor as having rows (rows of the call, rows stored).

    floor: bytes a row of the call's row tensors, each input read and each output written once.
    """

    op: str
    mode: str
    rows: tuple[int, ...]
    floor: float
    accesses: list[Access]

    def has_rows(self, access: Access) -> bool:
        return any(size in self.rows for size in access.shape)

    def asked(self) -> float:
        """Bytes a row that the kernels read and write, of every tensor with rows, scratch included."""
        return sum(a.read + a.written for a in self.accesses if self.has_rows(a)) / self.rows[0]

    def distinct(self) -> float:
        """The same, what one launch asks for repeatedly counted once: what remains where the repeats hit the cache."""
        return sum(a.distinct_read + a.distinct_written for a in self.accesses if self.has_rows(a)) / self.rows[0]

    def of(self, tensor: str) -> list[Access]:
        """The launches' accesses to one argument."""
        return [access for access in self.accesses if access.tensor == tensor]


def table(reports: Sequence[Report]) -> str:
    """One block a call: its launches' tensors, then bytes a row against the floor."""
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
        description="Count the bytes that the Triton kernels ask for, under the interpreter, with no GPU.",
    )
    flags.add_argument("--op", nargs="+", metavar="OP", default=[], help="default: all")
    flags.add_argument("--json", action="store_true", help="print every count as JSON")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Where the interpreter is not on, a child process has it: triton decides when it is imported."""
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
