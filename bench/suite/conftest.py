"""Options of `make bench`, one measurement for each case, and the table and files at the end.

This folder is not a package, or pytest would import the packages above it a second time, under the checkout's name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prudent.bench import cases, machine, measure, report
from prudent.bench.case import SIZES, Case

_TIMED = ("ours", "eager", "compiled")  # the tests' variants; the table also shows others


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prudent")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    group.addoption("--size", choices=SIZES, help="smoke, small (a CPU's default) or full (a GPU's)")
    group.addoption("--op", action="append", default=[], choices=cases.ops(), help="only this op; repeatable")
    group.addoption("--out", type=Path, default=Path("runs/bench"), help="folder of the results")


class Bench:
    """The state of a run: the machine, measured before the first case, and the rows so far."""

    def __init__(self, config: pytest.Config):
        self.device = str(config.getoption("--device"))
        self.size = str(config.getoption("--size") or cases.default_size(self.device))
        self.out: Path = config.getoption("--out")
        self.cases = cases.select(self.device, self.size, config.getoption("--op"))
        self.machine: machine.Machine | None = None
        self.rows: dict[str, measure.Row] = {}

    def row(self, case: Case) -> measure.Row:
        """The case's row; the first call measures all variants of the case in turns."""
        if self.machine is None:
            self.machine = machine.describe(self.device, quick=self.size == "smoke")
        if case.name not in self.rows:
            (self.rows[case.name],) = measure.run([case], self.device, self.size, progress=False)
        return self.rows[case.name]


_BENCH = pytest.StashKey[Bench]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BENCH] = Bench(config)


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    return request.config.stash[_BENCH]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        chosen = metafunc.config.stash[_BENCH].cases
        pairs = [pytest.param(case, name, id=f"{case.name}-{name}") for case in chosen for name in _TIMED]
        metafunc.parametrize(("case", "variant"), pairs)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[_BENCH]
    if found.machine is None:
        return
    rows = list(found.rows.values())
    here = machine.again(found.machine, [row.bandwidth for row in rows], quick=found.size == "smoke")
    written = report.write(rows, here, found.out)
    terminalreporter.section("prudent: the ops")
    terminalreporter.write_line(report.table(rows, here))
    terminalreporter.write_line(f"\nwritten: {', '.join(str(path) for path in written)}")
