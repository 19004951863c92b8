"""Every variant of every case as a pytest-benchmark test: `make bench`, or `pytest --confcutdir=bench/suite
bench/suite`.

pytest-benchmark runs all rounds of one function before the next function, so a change of clock or of the machine's load
would affect only one variant and falsify the ratio. `measure` therefore times the variants of a case in turns, and each
test replays the recorded samples through pytest-benchmark's public interface: `pedantic` with a clock that advances by
one sample a round. Its statistics, JSON, comparison and histogram work as for any other test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from prudent.bench.case import Case


class Recorded:
    """A clock on which each call of `play` takes as long as the next recorded sample."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def record(self, samples: Sequence[float]) -> None:
        self.now, self.samples = 0.0, iter(samples)

    def play(self) -> None:
        self.now += next(self.samples)

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:  # the timer's name in pytest-benchmark's JSON
        return "samples recorded in alternation"


clock = Recorded()


@pytest.mark.benchmark(timer=clock)
def test_op(bench: Any, benchmark: Any, case: Case, variant: str) -> None:
    """Check against fp64, then report the recorded times."""
    row = bench.row(case)
    benchmark.group = case.name
    if not row.passed and row.check is not None:
        pytest.fail(f"{row.check.output}: {row.check.error:.3g} from fp64, allowed {row.check.bound:.3g}")
    if variant not in row.samples:
        pytest.skip("; ".join(row.notes) or f"{case.name} has no {variant}")
    samples = row.samples[variant]
    benchmark.extra_info |= {"bytes_moved": row.bytes_moved, "extra_peak_bytes": row.memory[variant]}
    clock.record(samples)
    benchmark.pedantic(clock.play, rounds=len(samples))
