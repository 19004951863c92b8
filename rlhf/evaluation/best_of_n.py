"""Best-of-n as an attack on a reward model: what gold reward each way of reading the heads brings, and what that shows.

Every statement made here follows from an interval by a rule written down here; none is written for one outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...engine import EnsembleHead
from ...kernels import Aggregation, aggregate
from .statistics import BestOfN, Interval, best_of_n_curve, mean_interval

SINGLE = "single head"
# how the ensemble is read: the names of evaluate_heads -> the aggregation
ENSEMBLE = {"mean": "mean", "nominal": "nominal", "worst": "min", "tradeoff:0.4": "tradeoff:0.4"}
SCORERS = (SINGLE, *ENSEMBLE)
# what people read; the first word decides the colour in pictures
TITLES = {
    SINGLE: "single head",
    "mean": "mean of heads",
    "nominal": "nominal",
    "worst": "worst case",
    "tradeoff:0.4": "tradeoff λ=0.4",
    "oracle": "the gold scorer itself",
}
PESSIMISTIC = ("worst", "tradeoff:0.4")
REFERENCES = (SINGLE, "mean")
FLAT = "flat as far as can be told"


class Comparison(NamedTuple):
    """Gold reward of `scorer`'s pick minus that of `against`'s, from `n` responses: mean over prompts, paired."""

    scorer: str
    against: str
    n: int
    difference: Interval

    @property
    def verdict(self) -> str:
        """`higher` or `lower` where the 95 % interval leaves 0 out, else `no difference shown`."""
        return _verdict(self.difference, "higher", "lower", "no difference shown")


class Trend(NamedTuple):
    """Gold reward of a scorer's pick at `last` minus that at `first` responses, paired over prompts."""

    scorer: str
    first: int
    last: int
    difference: Interval

    @property
    def verdict(self) -> str:
        """`rises` or `falls` where the 95 % interval leaves 0 out, else `flat as far as can be told`."""
        return _verdict(self.difference, "rises", "falls", FLAT)


class Study(NamedTuple):
    """curves by scorer; oracle: the gold scorer picking for itself; comparisons and trends at the largest n."""

    curves: dict[str, BestOfN]
    oracle: BestOfN
    comparisons: list[Comparison]
    trends: list[Trend]


def rewards(single: EnsembleHead, ensemble: EnsembleHead, features: Tensor) -> dict[str, Tensor]:
    """[N, D] features -> scorer name -> [N] rewards; the ensemble's heads are computed once for all its readings."""
    with torch.no_grad():
        heads = ensemble(features, aggregation="mean")
        result = {SINGLE: single(features, aggregation="mean").reward}
        for name, spec in ENSEMBLE.items():
            result[name] = aggregate(heads.mean, heads.std, heads.mean, Aggregation.parse(spec), ensemble.std_ref)
    return result


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest` itself."""
    return sorted({2**i for i in range(largest.bit_length()) if 2**i <= largest} | {largest})


def study(proxies: Mapping[str, Tensor], gold: Tensor, *, resamples: int = 2000, seed: int = 0) -> Study:
    """Best-of-n curves of every scorer over P prompts with N responses each, and what their differences show.

    Args:
        proxies: scorer name -> [P, N] rewards, with the names of `SCORERS`.   gold: [P, N].
        resamples, seed: of the bootstrap over prompts.

    The trend is measured over the last factor 4 of n, chosen beforehand: comparing the end with the highest point would
    find a fall by chance, the highest point having been picked for being high.
    """
    ns = powers_of_two(gold.shape[1])
    curves = {name: best_of_n_curve(proxy, gold, ns) for name, proxy in proxies.items()}

    def interval(values: Tensor) -> Interval:
        return mean_interval(values, resamples=resamples, seed=seed)

    comparisons = [
        Comparison(
            name,
            against,
            ns[-1],
            interval(curves[name].gold_per_prompt[:, -1] - curves[against].gold_per_prompt[:, -1]),
        )
        for against in REFERENCES
        for name in curves
        if name != against and name not in REFERENCES[: REFERENCES.index(against)]
    ]
    early = max((i for i, n in enumerate(ns) if 4 * n <= ns[-1]), default=0)
    trends = [
        Trend(name, ns[early], ns[-1], interval(curve.gold_per_prompt[:, -1] - curve.gold_per_prompt[:, early]))
        for name, curve in curves.items()
    ]
    return Study(curves, best_of_n_curve(gold, gold, ns), comparisons, trends)


def findings(result: Study) -> list[str]:
    """The outcome in sentences, the headline first."""
    n, prompts = result.comparisons[0].n, result.oracle.gold_per_prompt.shape[0]
    found = {(c.scorer, c.against): c.verdict for c in result.comparisons}
    better, worse = (
        {r: [name for name in PESSIMISTIC if found[name, r] == verdict] for r in REFERENCES}
        for verdict in ("higher", "lower")
    )
    winners = [name for name in PESSIMISTIC if all(name in better[r] for r in REFERENCES)]
    gains, losses = _against(better), _against(worse)
    if winners:
        bring = "brings" if len(winners) == 1 else "bring"
        references = " and than the ".join(TITLES[r] for r in REFERENCES)
        headline = f"Pessimism wins here: at n = {n}, {_names(winners)} {bring} more gold reward than the {references}."
    elif gains and losses:
        headline = f"A mixed result: at n = {n}, pessimism gains gold reward ({gains}) and loses some ({losses})."
    elif gains:
        headline = f"Pessimism helps in part here: at n = {n} it brings more gold reward ({gains})."
    elif losses:
        headline = f"Pessimism does not win here: at n = {n} it costs gold reward ({losses})."
    else:
        headline = f"Pessimism does not win here: at n = {n}, {prompts} prompts show no difference either way."
    return [headline, *_differences(result), _trend(result), _share(result)]


def _against(names: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{_names(found)} against the {TITLES[r]}" for r, found in names.items() if found)


def _differences(result: Study) -> list[str]:
    lines = []
    for against in REFERENCES:
        parts = [
            f"{TITLES[c.scorer]} {_signed(c.difference)}, {c.verdict}"
            for c in result.comparisons
            if c.against == against
        ]
        n = result.comparisons[0].n
        lines.append(f"Gold reward at n = {n}, difference to the {TITLES[against]}: {'; '.join(parts)}.")
    return lines


def _trend(result: Study) -> str:
    groups = (("falls", "falls"), ("still rises", "rises"), ("is flat as far as can be told", FLAT))
    said, falling = [], False
    for words, verdict in groups:
        names = [t.scorer for t in result.trends if t.verdict == verdict]
        falling |= bool(names) and verdict == "falls"
        said += [f"{words} for {_names(names)}"] if names else []
    first, last = result.trends[0].first, result.trends[0].last
    meaning = "That fall is over-optimisation." if falling else "No fall, hence no over-optimisation, is shown."
    return f"From n = {first} to n = {last} the gold reward {', '.join(said)}. {meaning}"


def _share(result: Study) -> str:
    n, start, best = int(result.oracle.n[-1]), float(result.oracle.gold[0]), float(result.oracle.gold[-1])
    top = max(result.curves, key=lambda name: float(result.curves[name].gold[-1]))
    share = (float(result.curves[top].gold[-1]) - start) / (best - start) if best > start else 0.0
    return (
        f"Were the gold scorer to pick from {n}, it would raise the gold reward from {start:+.2f} "
        f"to {best:+.2f}; the best reward here, {TITLES[top]}, gets {share:.0%} of that."
    )


def _verdict(interval: Interval, above: str, below: str, neither: str) -> str:
    if interval.low is not None and interval.low > 0:
        return above
    if interval.high is not None and interval.high < 0:
        return below
    return neither


def _signed(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:+.3f}"
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _names(names: list[str]) -> str:
    """Titles of scorers, joined by commas and a last `and`."""
    titles = [TITLES[name] for name in names]
    return titles[0] if len(titles) == 1 else ", ".join(titles[:-1]) + " and " + titles[-1]
