"""Each variant of each case as a pytest-benchmark test: `make bench`, or `pytest --confcutdir=bench/suite bench/suite`.

pytest-benchmark runs one function's rounds after another's, so a change of clock or a neighbour's noise would fall on
one variant and look like a ratio. `measure` therefore alternates the variants of a case, and each test hands its
samples to pytest-benchmark's public interface: `pedantic` with a timer of its own, a clock that a round moves on by one
recorded sample. Its statistics, JSON, comparison and histogram then work as on any other test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ..case import Case


class Recorded:
    """A clock on which the next call of `play` takes as long as the next sample."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def record(self, samples: Sequence[float]) -> None:
        self.now, self.samples = 0.0, iter(samples)

    def play(self) -> None:
        self.now += next(self.samples)

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:  # what pytest-benchmark's JSON says of the timer
        return "samples recorded in alternation"


clock = Recorded()


@pytest.mark.benchmark(timer=clock)
def test_op(bench: Any, benchmark: Any, case: Case, variant: str) -> None:
    """Right against fp64, and how long it takes."""
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
