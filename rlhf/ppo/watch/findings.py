"""What a run's numbers show, in sentences. Every statement follows from an interval by a rule written down here.

A metric's value at one step is a mean over that step's samples, so it jumps about. A run is cut into blocks of steps;
the noise of one step is estimated from the differences of neighbouring steps (von Neumann 1941), which a slow trend
hardly touches; two blocks differ if the 95 % interval of their difference leaves 0 out. The intervals are about the
samples of this run. What another seed would do, one run cannot say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

BLOCKS = 8  # a run is cut into so many at most
FEWEST = 3  # steps of a block at least: six steps are needed to say anything
_NEAR = 0.005  # nats that two decimals show
_OF_SEVERAL = {f"reward/{name}" for name in ("nominal", "worst", "gap", "disagreement", "disagreement_ratio")}  # heads
RISES, FALLS, FLAT = "rises", "falls", "no change shown"

Rows = Sequence[Mapping[str, Any]]


class Series(NamedTuple):
    """One metric of a run where it was measured and finite."""

    steps: list[int]
    values: list[float]


class Change(NamedTuple):
    """The mean of the last block minus that of another, with a 95 % interval; `step`: where the other block ends."""

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
        """`rises` or `falls` where the interval leaves 0 out, else `no change shown`."""
        return RISES if self.low > 0 else FALLS if self.high < 0 else FLAT

    def within(self, bound: float) -> Change:
        """With an interval that stays between -bound and bound: what a change of that quantity can be."""
        return self._replace(low=max(self.low, -bound), high=min(self.high, bound))

    def __str__(self) -> str:
        form = "+.3f" if max(abs(self.low), abs(self.high)) < 10 else "+.1f"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def by_step(rows: Rows) -> list[dict[str, Any]]:
    """One row a step, in order: lines of the same step are joined, the later winning (a run may go back and repeat).

    Of a single head, which never disagrees, the metrics that say nothing are left out: nominal and worst case are the
    reward itself.
    """
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    found = [merged[step] for step in sorted(merged)]
    if not any(row.get("reward/disagreement") for row in found):
        found = [{name: value for name, value in row.items() if name not in _OF_SEVERAL} for row in found]
    return found


def series(rows: Rows, name: str) -> Series:
    """The metric `name` of `by_step` rows; steps without it, and null or infinite values, are left out."""
    found = [(row["step"], row[name]) for row in rows if _finite(row.get(name))]
    return Series([int(step) for step, _ in found], [float(value) for _, value in found])


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ends(found: Series) -> tuple[float, float] | None:
    """The mean of the first block and of the last, or the first and last value of a run too short for blocks."""
    if not found.values:
        return None
    blocks = _blocks(len(found.values)) or [range(1), range(len(found.values) - 1, len(found.values))]
    return tuple(fmean(found.values[i] for i in block) for block in (blocks[0], blocks[-1]))  # type: ignore[return-value]


def change(found: Series) -> Change | None:
    """From the first block to the last; None for a run too short for two blocks."""
    blocks = _blocks(len(found.values))
    return _difference(found, blocks[0], blocks[-1], 1) if blocks else None


def since(found: Series, step: int) -> Change | None:
    """From the block that ends at `step` to the last."""
    blocks = [block for block in _blocks(len(found.values)) if found.steps[block[-1]] <= step]
    return _difference(found, blocks[-1], _blocks(len(found.values))[-1], 1) if blocks else None


def fall(found: Series) -> Change | None:
    """The fall from the highest block to the last, if there is one beyond noise.

    The highest block is picked for being high, so its fall is held to an interval at 1 - 0.05 / (number of blocks it
    was picked from) (Bonferroni): without that, noise alone would show a fall in most runs.
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
    """What `ends` averages over in a run of so many steps, in words."""
    blocks = _blocks(steps)
    return count(len(blocks[-1]), "step") if blocks else "step alone"


def _blocks(steps: int) -> list[range]:
    """Equal blocks of at least FEWEST steps, at most BLOCKS; [] if there are not steps for two."""
    parts = min(BLOCKS, steps // FEWEST)
    if parts < 2:
        return []
    return [range(steps * i // parts, steps * (i + 1) // parts) for i in range(parts)]


def difference(one: Series, other: Series) -> Change | None:
    """The last block of `other` minus that of `one`, two runs of the same steps; None if either is too short."""
    if not (_blocks(len(one.values)) and _blocks(len(other.values))):
        return None
    parts = [(found, _blocks(len(found.values))[-1]) for found in (one, other)]
    means = [fmean(found.values[i] for i in block) for found, block in parts]
    squares = [_noise(found.values)[0] / len(block) for found, block in parts]
    freedom = [_noise(found.values)[1] for found, _ in parts]
    together = sum(squares) ** 2 / (sum(s**2 / f for s, f in zip(squares, freedom, strict=True)) or 1.0)  # Welch
    reach = math.sqrt(sum(squares)) * student_quantile(0.975, max(together, min(freedom)))
    gap = means[1] - means[0]
    return Change(one.steps[-1], means[0], means[1], gap - reach, gap + reach)


def _difference(found: Series, first: range, last: range, looks: int) -> Change:
    """The last block against another; `looks`: how many such comparisons it was picked from."""
    before, after = (fmean(found.values[i] for i in block) for block in (first, last))
    variance, freedom = _noise(found.values)
    error = math.sqrt(variance * (1 / len(first) + 1 / len(last)))
    reach = error * student_quantile(1 - 0.025 / looks, freedom)
    return Change(found.steps[first[-1]], before, after, after - before - reach, after - before + reach)


def _noise(values: Sequence[float]) -> tuple[float, float]:
    """Variance of one step's value about its trend, and the degrees of freedom of that estimate in normal noise."""
    n = len(values)
    variance = sum((b - a) ** 2 for a, b in pairwise(values)) / (2 * (n - 1))
    return variance, 2 * (n - 1) ** 2 / (3 * n - 4)


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t by expansion about the normal's (Abramowitz & Stegun 26.7.5).

    Within 2 % of the table from 5 degrees of freedom on, 6 % at 3, always on the small side.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def findings(rows: Rows, *, versus: str, steps: int | None = None, rolled_back_to: int | None = None) -> list[str]:
    """The outcome in sentences, the headline first.

    rows: of metrics.jsonl.   versus: what the heads' doubt is compared with ("the preference data", "the start").
    steps: how many were done; None: as many as `rows` tell.   rolled_back_to: the step whose policy was taken up again
    at the end, if any: the numbers up to the end are then another policy's.
    """
    rows = by_step(rows)
    if not rows:
        return ["No step was finished." if not steps else "metrics.jsonl is empty: nothing can be said of the run."]
    lines = [
        headline(rows),
        _rolled_back(rows, rolled_back_to),
        _reward(rows),
        _doubt(rows, versus),
        _distance(rows, rolled_back_to),
        _text(rows),
        faults(rows, steps),
    ]
    return [line for line in lines if line]


def headline(rows: Rows) -> str:
    """What happened to the gold reward while the proxy was optimised; `rows` of `by_step`."""
    proxy, gold = series(rows, "reward/mean"), series(rows, "gold/mean")
    up = change(proxy)
    if up is None:
        return f"{count(len(rows), 'step')}: too few to tell a change from noise ({2 * FEWEST} are needed)."
    if not gold.values:
        missing = "a number from the gold scorer" if "gold/mean" in rows[0] else "a gold scorer"
        return f"The proxy reward {_plain(up.verdict)} ({up}). Without {missing}, no one can tell if it was hacked."
    overall, down = change(gold), fall(gold)
    if overall is None:
        return "The gold reward was measured at too few steps to tell a change from noise."
    if down is not None:
        beyond = since(proxy, down.step)
        verdict = beyond.verdict if beyond else FLAT
        when = f"after step {down.step} the gold reward fell ({down})"
        if verdict == RISES:
            return f"Over-optimisation: {when} while the proxy rose ({beyond})."
        if verdict == FALLS:
            return f"The policy got worse: {when}, and so did the proxy ({beyond}). That is no over-optimisation."
        return f"The policy got worse: {when}, and the proxy shows no change since."
    said = f"gold {overall}, proxy {up}"
    if overall.verdict == RISES:
        with_proxy = "with the proxy" if up.verdict == RISES else f"while the proxy {_plain(up.verdict)}"
        return f"The gold reward rose {with_proxy} ({said}): no over-optimisation is shown."
    if up.verdict == RISES:
        return f"The proxy rose and the gold reward did not follow, as far as can be told ({said})."
    if up.verdict == FALLS:
        return f"The proxy fell, and the gold reward shows no change ({said})."
    return f"Neither proxy nor gold reward moved, as far as can be told ({said})."


def _plain(verdict: str) -> str:
    return {RISES: "rose", FALLS: "fell", FLAT: "shows no change"}[verdict]


def _reward(rows: Rows) -> str:
    parts = []
    names = {"proxy": "reward/mean", "nominal": "reward/nominal", "worst case": "reward/worst", "gold": "gold/mean"}
    for title, name in names.items():
        found = ends(series(rows, name))
        if found is not None:
            parts.append(f"{title} {found[0]:+.3f} to {found[1]:+.3f}")
    return f"From start to end: {', '.join(parts)}." if parts else ""


def _doubt(rows: Rows, versus: str) -> str:
    parts = []
    for words, name in (
        ("disagree {} times as much", "reward/disagreement_ratio"),
        ("predict {} times the std", "reward/head_std_ratio"),
    ):
        found = series(rows, name)
        last, moved = ends(found), change(found)
        if last is not None:
            trend = {RISES: " (growing)", FALLS: " (shrinking)"}.get(moved.verdict if moved else FLAT, "")
            parts.append(words.format(f"{last[1]:.2f}") + trend)
    return f"Compared with {versus}, the heads at the end {' and '.join(parts)}." if parts else ""


def _rolled_back(rows: Rows, step: int | None) -> str:
    if step is None:
        return ""
    return f"The policy that is kept is that of step {step}; the end told of here is a later one's, thrown away."


def _distance(rows: Rows, rolled_back_to: int | None) -> str:
    kl, token, chi2 = (ends(series(rows, f"kl/{name}")) for name in ("sequence", "token", "chi2"))
    if kl is None:
        return ""
    extra = [f"{token[1]:.3f} a token"] if token and kl[1] >= _NEAR else []
    extra += [f"chi-squared {chi2[1]:.3g}"] if chi2 else []
    said = f"{_nats(kl[1])} nats a response from the reference{_bracket(extra)}"
    if rolled_back_to is None:
        return f"The policy ended {said}."
    kept = next((row.get("kl/sequence") for row in rows if row["step"] == rolled_back_to), None)
    then = f", where it was {_nats(kept)} nats away" if kept is not None and _finite(kept) else ""
    return f"The policy had come {said} before it was rolled back to step {rolled_back_to}{then}."


def _nats(value: float) -> str:
    """An estimate of KL may come out below 0, which KL cannot be."""
    return f"{value:.2f}" if value >= _NEAR else "about 0"


def _text(rows: Rows) -> str:
    parts = []
    length, cut, entropy = (series(rows, name) for name in ("text/length", "text/truncated", "policy/entropy"))
    found = ends(length)
    if found:
        moved = change(length)
        parts.append(f"responses went from {found[0]:.1f} to {found[1]:.1f} tokens{_shown(moved)}")
    found = ends(cut)
    if found:
        parts.append(f"the share cut off from {100 * found[0]:.0f} to {100 * found[1]:.0f} %")
    found = ends(entropy)
    if found:
        parts.append(f"the entropy of a token from {found[0]:.2f} to {found[1]:.2f} nats{_shown(change(entropy))}")
    return _capital("; ".join(parts)) + "." if parts else ""


def faults(rows: Rows, steps: int | None = None) -> str:
    """What went wrong on the way, in sentences; "" if nothing did.

    rows: of `by_step`.   steps: how many were done; None: as many as `rows` tell.
    """
    dropped, skipped = total(rows, "samples/dropped"), total(rows, "update/skipped")
    starved = total([row for row in rows if not _finite(row.get("reward/mean"))], "update/skipped")
    broken = skipped - starved
    parts = [f"{count(dropped, 'sample')} without a finite reward left out"] if dropped else []
    parts += [f"{count(starved, 'update')} skipped because no sample was left"] if starved else []
    parts += [f"{count(broken, 'update')} skipped for a loss that was not finite"] if broken else []
    said = [_capital(", ".join(parts)) + "."] if parts else []
    gold = [row["gold/mean"] for row in rows if "gold/mean" in row]
    if gold and not any(map(_finite, gold)):
        said.append(f"The gold scorer gave no finite number in {count(len(gold), 'step')}.")
    done = steps if steps is not None else (rows[-1]["step"] + 1 if rows else 0)
    missing = sorted(set(range(done)) - {row["step"] for row in rows})
    if missing:
        said.append(f"metrics.jsonl lacks {_spans(missing)}: the numbers are of the others alone.")
    return " ".join(said)


def total(rows: Rows, name: str) -> int:
    """The sum of a metric that counts."""
    return int(sum(series(rows, name).values))


def _spans(steps: Sequence[int]) -> str:
    """`step 3`, `steps 0 to 4, 7`; `steps` ascending."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    said = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in spans)
    return f"step{'s' * (len(steps) > 1)} {said}"


def _shown(moved: Change | None) -> str:
    return "" if moved is None or moved.verdict != FLAT else " (no change shown)"


def _bracket(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def count(number: int, what: str) -> str:
    """`3 steps`, `1 step`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
