"""Statistics of rewards on preference pairs: pure functions of tensors, each with its formula and paper.

Computed in float64 on the CPU. A value that the data cannot give (the AUROC of one class, an interval from one prompt)
is None, never NaN; the caller reports the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 4_000_000  # elements of one block of resampling weights: 32 MB


class Interval(NamedTuple):
    """A value and its percentile bootstrap interval; None if the data cannot give it."""

    value: float | None
    low: float | None
    high: float | None


class Bin(NamedTuple):
    """A bin of a reliability picture: `size` pairs with a signal in [low, high], and their accuracy."""

    low: float
    high: float
    median: float
    size: int
    accuracy: Interval


def group_labels(keys: Iterable[Hashable]) -> Tensor:
    """Any hashable keys (prompts, sources) -> [P] int64 labels 0..G-1 in order of first appearance."""
    seen: dict[Hashable, int] = {}
    return torch.tensor([seen.setdefault(key, len(seen)) for key in keys], dtype=torch.int64)


def _resampled(groups: Tensor, resamples: int, seed: int) -> Iterator[Tensor]:
    """Blocks [r, P] of row weights: how often each row's group was drawn, G groups drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = int(groups.max()) + 1
    step = max(1, _CHUNK // max(len(groups), num_groups))
    for start in range(0, resamples, step):
        size = (min(step, resamples - start), num_groups)
        drawn = torch.randint(num_groups, size, generator=generator)
        counts = torch.zeros(size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(size, dtype=torch.float64))
        yield counts[:, groups]


def bootstrap(
    statistic: Callable[[Tensor], Tensor],
    num_rows: int,
    groups: Tensor | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of a weighted statistic over whole groups (prompts): rows of one prompt are not independent.

    Args:
        statistic: row weights [R, P] float64 -> [R] values; NaN, if a resample does not define one, is left out.
        num_rows: P.
        groups: [P] int64 labels 0..G-1; None: every row is its own group.
        resamples: number of bootstrap samples; seed: of their draw; level: coverage of the interval.

    Returns:
        Interval; low and high are None with fewer than 2 groups; all three are None without rows or if undefined.
    """
    if num_rows == 0:
        return Interval(None, None, None)
    value = statistic(torch.ones(1, num_rows, dtype=torch.float64))[0].item()
    groups = torch.arange(num_rows) if groups is None else groups
    if math.isnan(value) or int(groups.max()) == 0:
        return Interval(None if math.isnan(value) else value, None, None)
    draws = torch.cat([statistic(weights) for weights in _resampled(groups, resamples, seed)])
    draws = draws[~draws.isnan()]
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(draws, tail).tolist()
    return Interval(value, low, high)


def mean_interval(values: Tensor, groups: Tensor | None = None, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean of values [P] with its bootstrap interval over groups."""
    rows = values.double()
    return bootstrap(lambda w: w @ rows / w.sum(dim=1), len(rows), groups, resamples=resamples, seed=seed)


def pair_correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[P], [P] -> [P] bool: chosen > rejected, strictly.

    A tie is wrong, as in RewardBench: the scorer does not prefer the chosen response.
    """
    return chosen > rejected


def pair_accuracy(
    chosen: Tensor, rejected: Tensor, groups: Tensor | None = None, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Share of pairs with chosen > rejected (ties are wrong), with its bootstrap interval over groups (prompts)."""
    return mean_interval(pair_correct(chosen, rejected), groups, resamples=resamples, seed=seed)


def accuracy_difference(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    groups: Tensor | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Paired bootstrap: accuracy of `first` minus `second`'s, each (chosen [P], rejected [P]) on the same pairs."""
    gap = pair_correct(*first).double() - pair_correct(*second).double()
    return mean_interval(gap, groups, resamples=resamples, seed=seed)


def standardise(values: Tensor, sources: Tensor | None = None) -> Tensor:
    """[N] or [N, K] -> z-scores per column (and per source label [N]), population std; 0 where a source is constant."""
    values = values.double()
    if sources is not None:
        result = torch.empty_like(values)
        for source in sources.unique():
            rows = sources == source
            result[rows] = standardise(values[rows])
        return result
    if len(values) == 0:
        return values
    centred = values - values.mean(dim=0)
    std = centred.square().mean(dim=0).sqrt()
    # a constant column leaves rounding residue of about 1e-16 of its size, which must not become z-scores
    flat = std <= 1e-12 * values.abs().amax(dim=0)
    return torch.where(flat, torch.zeros_like(centred), centred / torch.where(flat, torch.ones_like(std), std))


def normalised_margin(chosen: Tensor, rejected: Tensor, sources: Tensor | None = None) -> Tensor:
    """[P]: z(chosen) - z(rejected), z over chosen and rejected together (BRME Fig. 6; the z of RewardBench, ddof 0).

    sources: [P] int64 data source of each pair; each source is then standardised alone.
    """
    both = None if sources is None else torch.cat([sources, sources])
    z = standardise(torch.cat([chosen, rejected]), both)
    return z[: len(chosen)] - z[len(chosen) :]


def covariance(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[2, 2] population covariance of (chosen, rejected) over pairs."""
    return torch.cov(torch.stack([chosen.double(), rejected.double()]), correction=0)


def ellipse_area(chosen: Tensor, rejected: Tensor) -> float:
    """Coverage (BRME Fig. 7 as a number): pi * sqrt(det cov), the area of the one-std ellipse of (chosen, rejected).

    In squared reward units: compare scorers after dividing each one's rewards by a common or by its own scale.
    """
    return math.pi * math.sqrt(max(0.0, torch.linalg.det(covariance(chosen, rejected)).item()))


def normalised_area(chosen: Tensor, rejected: Tensor) -> float:
    """`ellipse_area` of the rewards over their own std, both sides pooled: pi if the sides are unrelated, at most pi.

    It has no unit, so scorers can be compared; 0 if every reward is the same.
    """
    z = standardise(torch.cat([chosen, rejected]))
    return ellipse_area(z[: len(chosen)], z[len(chosen) :])


def correlation(columns: Tensor) -> Tensor:
    """[N, K] -> [K, K] Pearson correlation; NaN in the row and column of a constant head."""
    z = standardise(columns)
    matrix = (z.T @ z / len(z)).clamp(-1, 1)
    flat = z.abs().amax(dim=0) == 0
    matrix.fill_diagonal_(1.0)
    matrix[flat] = math.nan
    matrix[:, flat] = math.nan
    return matrix


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's rho of two [N] tensors; None for fewer than 2 rows or if either is constant."""
    from scipy.stats import spearmanr  # imported late: scipy.stats takes a second

    if len(first) < 2 or any(bool((values == values[0]).all()) for values in (first, second)):
        return None
    return float(spearmanr(first.double().cpu(), second.double().cpu()).statistic)


def share_interval(hits: int, trials: int) -> Interval:
    """The share of hits with its 95 % Wilson score interval, whose width is above 0 even for no hits or all hits."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, trials).proportion_ci(method="wilson")
    return Interval(hits / trials, float(low), float(high))


def auroc(signal: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """P(signal of a positive > signal of a negative), ties counting one half; NaN if a class has no weight.

    signal [P], positive [P] bool, weights [R, P] float64 -> [R]; without weights R = 1.
    """
    weights = torch.ones(1, len(signal), dtype=torch.float64) if weights is None else weights
    order = signal.argsort(stable=True)
    _, tie = signal[order].unique_consecutive(return_inverse=True)
    w, is_positive = weights[:, order], positive[order]
    negative = w * ~is_positive
    per_tie = torch.zeros(len(w), int(tie[-1]) + 1 if len(tie) else 0, dtype=w.dtype)
    per_tie.scatter_add_(1, tie.expand_as(w), negative)
    below = per_tie.cumsum(dim=1) - per_tie / 2
    hits = (w * is_positive * below[:, tie]).sum(dim=1)
    return hits / (negative.sum(dim=1) * (w * is_positive).sum(dim=1))


def auroc_interval(
    signal: Tensor, positive: Tensor, groups: Tensor | None = None, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """AUROC with its bootstrap interval over groups; all None if one class is empty."""
    return bootstrap(lambda w: auroc(signal, positive, w), len(signal), groups, resamples=resamples, seed=seed)


def reliability(
    signal: Tensor,
    correct: Tensor,
    groups: Tensor | None = None,
    *,
    bins: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Bin]:
    """Accuracy of the pairs in bins of about equal count by `signal` [P]; a useful uncertainty signal makes it fall.

    Equal signals share a bin, so a signal with few values gives fewer bins than asked.
    """
    if len(signal) == 0:
        return []
    signal = signal.double()
    edges = torch.quantile(signal, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]).unique()
    where = torch.bucketize(signal, edges)
    result = []
    for index in where.unique().tolist():
        rows = where == index
        values = signal[rows]
        inside = None if groups is None else groups[rows].unique(return_inverse=True)[1]
        accuracy = mean_interval(correct[rows], inside, resamples=resamples, seed=seed)
        result.append(Bin(values.min().item(), values.max().item(), values.median().item(), int(rows.sum()), accuracy))
    return result


def effective_rank(features: Tensor) -> float | None:
    """exp(entropy of the singular values' shares): 1 for a line, D for an isotropic cloud (2505.07271; not centred).

    features [N, D]; None for no rows or all zeros. Costs a full SVD: give it a few thousand rows at most.
    """
    if len(features) == 0:
        return None
    values = torch.linalg.svdvals(features.double())
    if values.sum() == 0:
        return None
    share = values / values.sum()
    return math.exp(torch.special.entr(share).sum().item())


def hidden_norms(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """BSR's dispersion (arXiv 2505.07271, 3.1): mean and std of ||h|| over both sides, and of | ||h_w|| - ||h_l|| |.

    chosen, rejected: [P, D] hidden states, or [P] norms already taken.
    """
    a, b = ((x if x.dim() == 1 else x.float().norm(dim=1)).double() for x in (chosen, rejected))
    norms, gap = torch.cat([a, b]), (a - b).abs()
    return {
        "norm_mean": float(norms.mean()),
        "norm_std": float(norms.std(correction=0)),
        "norm_gap_mean": float(gap.mean()),
        "norm_gap_std": float(gap.std(correction=0)),
    }


def norm_dispersion(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """`hidden_norms` of features [P, D] and how far apart the two sides are.

    mean, std: of ||h|| over both sides (population); relative: std / mean; gap: mean of | ||h_w|| - ||h_l|| |;
    distance: mean of ||h_w - h_l||.
    """
    norms = hidden_norms(chosen, rejected)
    mean, std = norms["norm_mean"], norms["norm_std"]
    return {
        "mean": mean,
        "std": std,
        "relative": std / mean if mean else 0.0,
        "gap": norms["norm_gap_mean"],
        "distance": (chosen.double() - rejected.double()).norm(dim=1).mean().item(),
    }
