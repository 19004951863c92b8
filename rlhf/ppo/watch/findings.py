"""Distinguish changes of a PPO run's metrics from noise, and state what the run shows.

A metric's value at one step is the noisy mean over that step's samples. The run is cut into blocks of steps. The noise
of one step is estimated from the differences of neighbouring steps (von Neumann 1941), which a slow trend hardly
affects. Two blocks differ if the 95 % interval of their difference excludes 0. The intervals cover the samples of this
run, not other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

from ...report.words import count, signed, verdict

BLOCKS = 8  # largest number of blocks in a run
FEWEST = 3  # smallest number of steps in a block: a change needs six steps
# metrics that are meaningful only with several heads
_OF_SEVERAL = {f"reward/{name}" for name in ("nominal", "worst", "gap", "disagreement", "disagreement_ratio")}
RISES, FALLS, FLAT = "rises", "falls", "no change shown"
_PAST = {RISES: "rose", FALLS: "fell", FLAT: "shows no change"}

Rows = Sequence[Mapping[str, Any]]


class Series(NamedTuple):
    """One metric of a run at the steps where it was measured and finite."""

    steps: list[int]
    values: list[float]


class Change(NamedTuple):
    """The mean of the last block minus that of an earlier one, with a 95 % interval; `step`: end of the earlier one."""

    step: int
    first: float
    last: float
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.last - self.first

    @property
    def verdict(self) -> str:
        """`rises` or `falls` if the interval excludes 0, else `no change shown`."""
        return verdict((self.value, self.low, self.high), RISES, FALLS, FLAT)

    def within(self, bound: float) -> Change:
        """The same change with its interval cut to [-bound, bound], for a quantity that cannot change by more."""
        return self._replace(low=max(self.low, -bound), high=min(self.high, bound))

    def __str__(self) -> str:
        digits = 3 if max(abs(self.low), abs(self.high)) < 10 else 1
        return signed((self.value, self.low, self.high), digits)


def by_step(rows: Rows) -> list[dict[str, Any]]:
    """One row per step, in order; of several lines of one step (a resumed run repeats steps) the later values win.

    Without any disagreement the reward has a single head: nominal and worst case equal the reward and are left out.
    """
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    found = [merged[step] for step in sorted(merged)]
    if not any(row.get("reward/disagreement") for row in found):
        found = [{name: value for name, value in row.items() if name not in _OF_SEVERAL} for row in found]
    return found


def series(rows: Rows, name: str) -> Series:
    """The metric `name` of `by_step` rows; steps where it is absent, null or infinite are left out."""
    found = [(row["step"], row[name]) for row in rows if _finite(row.get(name))]
    return Series([int(step) for step, _ in found], [float(value) for _, value in found])


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ends(found: Series) -> tuple[float, float] | None:
    """Means of the first and last block; the first and last value if the run is too short for blocks."""
    if not found.values:
        return None
    blocks = _blocks(len(found.values)) or [range(1), range(len(found.values) - 1, len(found.values))]
    return tuple(fmean(found.values[i] for i in block) for block in (blocks[0], blocks[-1]))  # type: ignore[return-value]


def change(found: Series) -> Change | None:
    """The change from the first block to the last; None if the run is too short for two blocks."""
    blocks = _blocks(len(found.values))
    return _difference(found, blocks[0], blocks[-1], 1) if blocks else None


def since(found: Series, step: int) -> Change | None:
    """The change from the last block that ends by `step` to the last of all; None if there is no such block."""
    blocks = [block for block in _blocks(len(found.values)) if found.steps[block[-1]] <= step]
    return _difference(found, blocks[-1], _blocks(len(found.values))[-1], 1) if blocks else None


def fall(found: Series) -> Change | None:
    """The fall from the highest block to the last, or None if noise explains it.

    The highest block is selected for being high, so its interval has level 1 - 0.05 / (number of candidate blocks)
    (Bonferroni); without that, noise alone would show a fall in most runs.
    """
    blocks = _blocks(len(found.values))
    if not blocks:
        return None
    highest = max(blocks[:-1], key=lambda block: fmean(found.values[i] for i in block))
    picked = _difference(found, highest, blocks[-1], len(blocks) - 1)
    if picked.verdict == FALLS:
        return picked
    whole = _difference(found, blocks[0], blocks[-1], 1)
    return whole if whole.verdict == FALLS else None


def block_length(steps: int) -> str:
    """What `ends` averages over in a run of `steps` steps, in words: "3 steps"."""
    blocks = _blocks(steps)
    return count(len(blocks[-1]), "step") if blocks else "step alone"


def _blocks(steps: int) -> list[range]:
    """At most BLOCKS equal blocks of at least FEWEST steps; [] if there are too few steps for two."""
    parts = min(BLOCKS, steps // FEWEST)
    if parts < 2:
        return []
    return [range(steps * i // parts, steps * (i + 1) // parts) for i in range(parts)]


def difference(one: Series, other: Series) -> Change | None:
    """The mean of the last block of `other` minus that of `one`, runs of one length; None if they are too short."""
    if not (_blocks(len(one.values)) and _blocks(len(other.values))):
        return None
    parts = [(found, _blocks(len(found.values))[-1]) for found in (one, other)]
    means = [fmean(found.values[i] for i in block) for found, block in parts]
    squares = [_noise(found.values)[0] / len(block) for found, block in parts]
    freedom = [_noise(found.values)[1] for found, _ in parts]
    together = sum(squares) ** 2 / (sum(s**2 / f for s, f in zip(squares, freedom, strict=True)) or 1.0)  # Welch
    reach = math.sqrt(sum(squares)) * _student_quantile(0.975, max(together, min(freedom)))
    gap = means[1] - means[0]
    return Change(one.steps[-1], means[0], means[1], gap - reach, gap + reach)


def _difference(found: Series, first: range, last: range, looks: int) -> Change:
    """The change from block `first` to block `last`; `looks`: number of comparisons from which it was selected."""
    before, after = (fmean(found.values[i] for i in block) for block in (first, last))
    variance, freedom = _noise(found.values)
    error = math.sqrt(variance * (1 / len(first) + 1 / len(last)))
    reach = error * _student_quantile(1 - 0.025 / looks, freedom)
    return Change(found.steps[first[-1]], before, after, after - before - reach, after - before + reach)


def _noise(values: Sequence[float]) -> tuple[float, float]:
    """Variance of one step's value around its trend, and the estimate's degrees of freedom under normal noise."""
    n = len(values)
    variance = sum((b - a) ** 2 for a, b in pairwise(values)) / (2 * (n - 1))
    return variance, 2 * (n - 1) ** 2 / (3 * n - 4)


def _student_quantile(probability: float, freedom: float) -> float:
    from scipy.stats import t  # takes seconds to import; reports need it, the training loop does not

    return float(t.ppf(probability, freedom))


def findings(rows: Rows, *, steps: int | None = None, rolled_back_to: int | None = None) -> list[str]:
    """State in sentences what the table of a run's metrics cannot show: the headline, a rollback, faults.

    rows: of metrics.jsonl.   steps: number of steps done; None: as in `rows`.   rolled_back_to: the step whose policy
    was restored at the end, if any; the numbers of later steps then belong to another policy.
    """
    rows = by_step(rows)
    if not rows:
        return ["No step was finished." if not steps else "metrics.jsonl is empty: it shows nothing of the run."]
    lines = [headline(rows), _foreign(rows), _rolled_back(rows, rolled_back_to), faults(rows, steps)]
    return [line for line in lines if line]


def headline(rows: Rows) -> str:
    """Say what happened to the gold reward while the proxy was optimised; `rows` of `by_step`."""
    proxy, gold = series(rows, "reward/mean"), series(rows, "gold/mean")
    up = change(proxy)
    if up is None:
        return f"{count(len(rows), 'step')}: too few to tell a change from noise ({2 * FEWEST} are needed)."
    if not gold.values:
        missing = "a finite gold reward" if "gold/mean" in rows[0] else "a gold scorer"
        return f"The proxy reward {_PAST[up.verdict]} ({up}). Without {missing}, reward hacking cannot be detected."
    overall, down = change(gold), fall(gold)
    if overall is None:
        return "The gold reward was measured at too few steps to tell a change from noise."
    if down is not None:
        beyond = since(proxy, down.step)
        fell = f"after step {down.step} the gold reward fell ({down})"
        if beyond is None or beyond.verdict == FLAT:
            return f"The policy got worse: {fell}, and the proxy shows no change since."
        if beyond.verdict == RISES:
            return f"Over-optimisation: {fell} while the proxy rose ({beyond})."
        return f"The policy got worse: {fell}, and so did the proxy ({beyond}). That is not over-optimisation."
    verdict = " No over-optimisation is shown." if overall.verdict == RISES else ""
    return f"The gold reward {_PAST[overall.verdict]} ({overall}) while the proxy {_PAST[up.verdict]} ({up}).{verdict}"


def _foreign(rows: Rows) -> str:
    """Say that the policy left the texts that the reward knows; "" if it did not, or no distance was measured."""
    share = series(rows, "text/foreign")
    moved = change(share)
    if moved is None or moved.verdict != RISES:
        return ""
    return (
        f"The policy leaves what the reward knows: {100 * moved.first:.0f} % of the responses were foreign (beyond the "
        f"95 % quantile of the reference's distance) in the first block of steps, {100 * moved.last:.0f} % in the last."
    )


def _rolled_back(rows: Rows, step: int | None) -> str:
    if step is None:
        return ""
    kl = next((row["kl/sequence"] for row in rows if row["step"] == step and _finite(row.get("kl/sequence"))), None)
    there = "" if kl is None else f" (KL {kl:.2f} nats a response)"
    return f"The kept policy is that of step {step}{there}; the table's end is a later policy, which was discarded."


FOREIGN_AT_START = 0.2  # 5 % are expected where the region is that of the policy's own responses


def faults(rows: Rows, steps: int | None = None) -> str:
    """Say in sentences what went wrong during the run; "" if nothing did.

    rows: of `by_step`.   steps: number of steps done; None: as in `rows`.
    """
    dropped, skipped = total(rows, "samples/dropped"), total(rows, "update/skipped")
    starved = total([row for row in rows if not _finite(row.get("reward/mean"))], "update/skipped")
    gold = [row["gold/mean"] for row in rows if "gold/mean" in row]
    done = steps if steps is not None else (rows[-1]["step"] + 1 if rows else 0)
    missing = sorted(set(range(done)) - {row["step"] for row in rows})
    before = rows[0].get("text/foreign") if rows and rows[0]["step"] == 0 else None
    unknown: float = before if before is not None and _finite(before) else 0.0
    strange = f"Before any update, {100 * unknown:.0f} % of the policy's own responses lie beyond distance 1"
    found = {
        f"{strange}: the reward's trust region is that of other responses. Fit it to these with "
        "`prudent sample` and `prudent calibrate`.": unknown > FOREIGN_AT_START,
        f"{count(dropped, 'sample')} without a finite reward left out.": dropped,
        f"{count(starved, 'update')} skipped because no sample was left.": starved,
        f"{count(skipped - starved, 'update')} skipped for a loss that was not finite.": skipped - starved,
        f"The gold scorer gave no finite number in {count(len(gold), 'step')}.": gold and not any(map(_finite, gold)),
        f"metrics.jsonl lacks {_spans(missing)}: the numbers cover only the other steps.": missing,
    }
    return " ".join(sentence for sentence, happened in found.items() if happened)


def total(rows: Rows, name: str) -> int:
    """The sum of the counts in metric `name`."""
    return int(sum(series(rows, name).values))


def _spans(steps: Sequence[int]) -> str:
    """Ascending steps as text: "step 3", "steps 0 to 4, 7"."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    listed = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in spans)
    return f"step{'s' * (len(steps) > 1)} {listed}"
