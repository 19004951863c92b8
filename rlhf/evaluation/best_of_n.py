"""Best-of-n as an attack on a reward model: estimate the gold reward of each aggregation's picks and compare them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...engine import EnsembleHead
from ...kernels import Aggregation, aggregate
from ..report.words import verdict
from .statistics import Interval, mean_interval

SINGLE = "single head"
# aggregations of the ensemble: their names in evaluate_heads -> in `Aggregation.parse`
ENSEMBLE = {"mean": "mean", "nominal": "nominal", "worst": "min", "tradeoff:0.4": "tradeoff:0.4"}
SCORERS = (SINGLE, *ENSEMBLE)
# names in tables and pictures; the first word selects the colour
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


class BestOfN(NamedTuple):
    """Best-of-n estimates for M values of n over P prompts.

    n                [M] int64     kl  [M]  log n - (n - 1) / n, nats
    proxy, gold      [M]           mean over prompts of the expected reward of the proxy's pick from n responses
    proxy_se, gold_se  [M]         standard error over prompts (ddof 1); NaN where P is 1
    gold_per_prompt  [P, M]        for paired comparisons of two proxies on the same samples
    proxy_spread, gold_spread      standard deviation within prompts (root of the mean variance): the unit in which
                                   curves of different proxies can be compared
    """

    n: Tensor
    kl: Tensor
    proxy: Tensor
    gold: Tensor
    proxy_se: Tensor
    gold_se: Tensor
    gold_per_prompt: Tensor
    proxy_spread: float
    gold_spread: float


class Comparison(NamedTuple):
    """Gold reward of `scorer`'s pick minus that of `against`'s, from `n` responses: mean over prompts, paired."""

    scorer: str
    against: str
    n: int
    difference: Interval

    @property
    def verdict(self) -> str:
        """`higher` or `lower` if the 95 % interval excludes 0, else `no difference shown`."""
        return verdict(self.difference)


class Trend(NamedTuple):
    """Gold reward of a scorer's pick at `last` minus that at `first` responses, paired over prompts."""

    scorer: str
    first: int
    last: int
    difference: Interval

    @property
    def verdict(self) -> str:
        """`rises` or `falls` if the 95 % interval excludes 0, else `no change shown`."""
        return verdict(self.difference, "rises", "falls", "no change shown")


class Study(NamedTuple):
    """Curves by scorer, the curve of the gold scorer's own picks, and comparisons and trends at the largest n."""

    curves: dict[str, BestOfN]
    oracle: BestOfN
    comparisons: list[Comparison]
    trends: list[Trend]


def bon_kl(n: float) -> float:
    """Upper bound of KL(best-of-n || policy) in nats, an equality without ties: log n - (n - 1) / n (2401.01879)."""
    if n < 1:
        raise ValueError(f"bon_kl: n: expected at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_weights(num_samples: int, n: int) -> Tensor:
    """[N] float64: the chance that the i-th smallest of N is the largest of n drawn without replacement (Coste)."""
    i = torch.arange(1, num_samples + 1, dtype=torch.float64)
    # C(i-1, n-1) / C(N, n) by logarithms; the constant cancels in the final normalisation (the weights sum to 1)
    log_weight = torch.lgamma(i) - torch.lgamma((i - n + 1).clamp_min(1))
    log_weight = log_weight.masked_fill(i < n, -math.inf)
    return torch.softmax(log_weight, dim=0)


def _mean_over_ties(proxy: Tensor, gold: Tensor) -> Tensor:
    """[N] sorted proxy, [N] gold -> gold, equal proxies sharing their mean: the expectation under random tie-breaks."""
    _, tie, counts = proxy.unique_consecutive(return_inverse=True, return_counts=True)
    if len(counts) == len(proxy):
        return gold
    means: Tensor = gold.new_zeros(len(counts)).index_add_(0, tie, gold) / counts
    return means[tie]


def best_of_n_curve(proxy: Tensor, gold: Tensor, ns: Sequence[int]) -> BestOfN:
    """Unbiased best-of-n from N scored samples per prompt: the mean over every subset of n (2310.02743 eq. 7-8).

    Samples with equal proxy share their mean gold reward, which is the expectation when a tie is broken at random.

    Args:
        proxy: [P, N] rewards that select; gold: [P, N] rewards of the selected response. Finite.
        ns: values of n, each from 1 to N.

    Raises:
        ValueError: for shapes that differ, fewer than one prompt or sample, n out of range, or non-finite rewards.
    """
    if proxy.dim() != 2 or proxy.shape != gold.shape or proxy.numel() == 0:
        raise ValueError(
            f"best_of_n_curve: expected proxy and gold of one shape [P, N] with P, N >= 1, "
            f"got {list(proxy.shape)} and {list(gold.shape)}"
        )
    num_prompts, num_samples = proxy.shape
    for n in ns:
        if not 1 <= n <= num_samples:
            raise ValueError(f"best_of_n_curve: ns: expected values from 1 to {num_samples} (N), got {n}")
    for name, values in (("proxy", proxy), ("gold", gold)):
        if not values.isfinite().all():
            raise ValueError(
                f"best_of_n_curve: {name}: expected finite rewards, got {int((~values.isfinite()).sum())} that are not"
            )
    proxy, gold = proxy.double().cpu(), gold.double().cpu()
    proxy, order = proxy.sort(dim=1)
    gold = torch.stack([_mean_over_ties(*row) for row in zip(proxy, gold.gather(1, order), strict=True)])
    weights = torch.stack([best_of_n_weights(num_samples, n) for n in ns])
    picked_proxy, picked_gold = proxy @ weights.T, gold @ weights.T
    root = math.sqrt(num_prompts)
    se = [
        v.std(dim=0) / root if num_prompts > 1 else torch.full_like(v[0], math.nan) for v in (picked_proxy, picked_gold)
    ]
    return BestOfN(
        torch.tensor(list(ns)),
        torch.tensor([bon_kl(n) for n in ns], dtype=torch.float64),
        picked_proxy.mean(dim=0),
        picked_gold.mean(dim=0),
        se[0],
        se[1],
        picked_gold,
        _spread(proxy),
        _spread(gold),
    )


def _spread(values: Tensor) -> float:
    return values.var(dim=1, correction=0).mean().sqrt().item()


def rewards(single: EnsembleHead, ensemble: EnsembleHead, features: Tensor) -> dict[str, Tensor]:
    """[N, D] features -> scorer name -> [N] rewards; the ensemble's heads are computed once for all aggregations."""
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
    """Best-of-n curves of every scorer over P prompts with N responses each, and their paired differences.

    Args:
        proxies: scorer name -> [P, N] rewards, with the names of `SCORERS`.   gold: [P, N].
        resamples, seed: of the bootstrap over prompts.

    The trend is measured over the last factor 4 of n, chosen beforehand: the fall from the highest point would be
    biased, because that point is selected for being high.
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
    """Two sentences, decided by the intervals: whether pessimism wins, and whether a scorer is over-optimised."""
    n, prompts = result.comparisons[0].n, result.oracle.gold_per_prompt.shape[0]
    found = {(c.scorer, c.against): c.verdict for c in result.comparisons}
    winners = [name for name in PESSIMISTIC if all(found[name, r] == "higher" for r in REFERENCES)]
    gains, losses = _against(found, "higher"), _against(found, "lower")
    if winners:
        references = " and than the ".join(TITLES[r] for r in REFERENCES)
        headline = f"Pessimism wins here: at n = {n}, more gold reward than the {references} for {_names(winners)}."
    elif gains and losses:
        headline = f"A mixed result: at n = {n}, pessimism gains gold reward ({gains}) and loses some ({losses})."
    elif gains:
        headline = f"Pessimism helps in part here: at n = {n} it gains gold reward ({gains})."
    elif losses:
        headline = f"Pessimism does not win here: at n = {n} it loses gold reward ({losses})."
    else:
        headline = f"Pessimism does not win here: at n = {n}, {prompts} prompts show no difference."
    trend = result.trends[0]
    span = f"from n = {trend.first} to n = {trend.last}"
    falling = [t.scorer for t in result.trends if t.verdict == "falls"]
    if falling:
        return [headline, f"Over-optimisation: {span} the gold reward falls for {_names(falling)}."]
    return [headline, f"No over-optimisation is shown: no scorer's gold reward falls {span}."]


def _against(found: Mapping[tuple[str, str], str], verdict: str) -> str:
    """The pessimistic scorers with this verdict against each reference, in words; "" if there are none."""
    names = {r: [name for name in PESSIMISTIC if found[name, r] == verdict] for r in REFERENCES}
    return "; ".join(f"{_names(scorers)} against the {TITLES[r]}" for r, scorers in names.items() if scorers)


def _names(scorers: Sequence[str]) -> str:
    return " and ".join(", ".join(TITLES[name] for name in scorers).rsplit(", ", 1))
