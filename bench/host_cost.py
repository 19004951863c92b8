"""Time what the host does in a call of `ensemble_reward` on a GPU, on a machine that has none.

    python -m prudent.bench.host_cost [--rows 8 64 256 512] [--rounds 2000] [--out FILE]

The calls score last tokens: N of 2048 stored rows, D = 4096, K = 5 heads, bf16 features with a norm and a seed, no
gradient. Triton's own launcher, in Python and C, starts each kernel, over a libcuda whose launch does nothing
(stub_cuda.py). Two ways are timed, in turns:

    plain       every call checks its arguments, chooses a tile and goes through Triton's launcher in Python
    repeated    a call of a class that was launched before starts the compiled kernel at once (kernels/replay.py)

The time ends at the driver's launch. Outputs and scratch are allocated on the CPU, and asking for the stream, the
device and a capture costs nothing here: on a GPU each may take more. Each number is the mean of CALLS calls; the least
of many is that of an idle core, the median that of the machine as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .fake_driver import fake_gpu
from .machine import cpu_name
from .stub_cuda import StubDriver

CALLS = 10  # in one number: a millisecond, which often passes without another process in between
GOAL = 25.0  # us a call
STORED, D, K = 2048, 4096, 5
WAYS = ("plain", "repeated")

HEADER = """# What the host does in a call of `ensemble_reward`

Written by `python -m prudent.bench.host_cost --out FILE`, whose docstring says what is timed: microseconds a call from
the public function to the driver's launch, in Triton's own launcher over a driver that does nothing. On a GPU it was
not measured.
"""


def _nothing(*arguments: Any) -> None:
    """Not a mock, whose call would take longer than what it stands for."""


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Inside the block, every call goes through Triton's launcher, and none is kept."""
    from ..kernels.ensemble_reward import triton as execution  # type: ignore[attr-defined]

    with (
        mock.patch.object(execution, "again", _nothing),
        mock.patch.object(execution, "_keep", _nothing),
    ):
        yield


def call_of(rows: int) -> Callable[[], Any]:
    """A call that scores `rows` last tokens."""
    from ..kernels.ensemble_reward import ensemble_reward

    hidden = torch.zeros(STORED, D, dtype=torch.bfloat16)
    weight, bias, norm_weight = torch.zeros(2 * K, D), torch.zeros(2 * K), torch.ones(D, dtype=torch.bfloat16)
    last, seed = torch.zeros(rows, dtype=torch.int64), torch.tensor([7])
    return lambda: ensemble_reward(hidden, weight, bias, rows=last, norm_weight=norm_weight, seed=seed)


def measure(rows: int, rounds: int, driver: StubDriver) -> dict[str, dict[str, float]]:
    """{way: {"median", "least"}} in us a call, from `rounds` numbers of each way."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.no_grad(), fake_gpu(driver):
        call, before = call_of(rows), driver.launches
        call()
        gc.disable()
        try:
            for _ in range(rounds):
                for way in WAYS:
                    with _plain() if way == "plain" else contextlib.nullcontext():
                        call()
                        start = time.perf_counter_ns()
                        for _ in range(CALLS):
                            call()
                        times[way].append((time.perf_counter_ns() - start) / CALLS / 1000)
        finally:
            gc.enable()
        assert driver.launches - before == 1 + rounds * len(WAYS) * (1 + CALLS)
    return {way: {"median": statistics.median(found), "least": min(found)} for way, found in times.items()}


def table(record: dict[str, Any]) -> str:
    """The numbers as markdown, and whether the goal holds."""
    where = "{machine}, one thread, torch {torch}, Triton {triton}, {date}; {rounds} numbers of {calls} calls each."
    lines = [HEADER, where.format(**record), "", "| rows | way | least, us | median, us |", "|---|---|---|---|"]
    for rows, ways in record["times"].items():
        lines += [f"| {rows} | {way} | {t['least']:.1f} | {t['median']:.1f} |" for way, t in ways.items()]
    worst = max(ways["repeated"]["least"] for ways in record["times"].values())
    lines += ["", "| | measured | goal | holds |", "|---|---|---|---|"]
    lines += [f"| repeated, idle core | {worst:.1f} us | under {GOAL:g} us | {'yes' if worst < GOAL else 'NO'} |", ""]
    return "\n".join(lines)


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 64, 256, 512])
    parser.add_argument("--rounds", type=int, default=2000, help="numbers for each way (default %(default)s)")
    parser.add_argument("--out", type=Path, help="FILE: writes FILE.json and FILE.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        driver = StubDriver(Path(folder))
        times = {str(rows): measure(rows, given.rounds, driver) for rows in given.rows}
    record = {
        "machine": cpu_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "date": str(date.today()), "rounds": given.rounds, "calls": CALLS,
        "times": times,
    }  # fmt: skip
    print(table(record))
    if given.out:
        given.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        given.out.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
