"""Compute all metrics of `prudent eval` for K heads on preference pairs, as one JSON-able dictionary."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import Aggregation, nominal_reward
from . import statistics
from .scored_pairs import SINGLE, UNTRAINED, HeadOutput, Pairs, Side, finite_pairs, pairs_of
from .statistics import Interval

SOURCE_PAIRS = 20  # smaller sources are standardised together: with two rewards, z-scores are always +1 and -1
RANK_ROWS = 2048  # of each side: an SVD of 4096 x 4096 takes about a minute on one core


def evaluate_heads(
    chosen: HeadOutput,
    rejected: HeadOutput,
    *,
    aggregation: str | Aggregation = "tradeoff:0.4",
    std_ref: Tensor | None = None,
    unit: Tensor | None = None,
    prompts: Sequence[Hashable] | None = None,
    sources: Sequence[Hashable] | None = None,
    scores: tuple[Tensor, Tensor] | None = None,
    compare: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    features: tuple[Tensor, Tensor] | None = None,
    foreign: tuple[HeadOutput, HeadOutput] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate K heads on P preference pairs by their means, without sampling noise.

    Args:
        chosen, rejected: the heads' mean and std [P, K], calibrated, and any distance [P]; row i of both the same pair.
        aggregation: the reward under test, without its centring, which shifts both rewards of a pair equally.
        std_ref: [K] each head's typical std (`EnsembleHead.std_ref`), for nominal=relative_std.
        unit: [1] of the trust region, for an aggregation that prices the distance.
        prompts: [P] keys; intervals resample prompts. None: every pair is its own prompt.
        sources: [P] keys of the data source; z-scores (margin, scoring) are taken per source; sources of fewer than
            20 pairs are taken together.
        scores: given scores, chosen [P] and rejected [P]; NaN where a pair has none.
        compare: other scorers' rewards of the same pairs: name -> (chosen [P], rejected [P]).
        features: the trunk's hidden states, chosen [P, D] and rejected [P, D].
        foreign: the heads' outputs on pairs of other data, to test if std or disagreement detects them.
        resamples, seed: of the bootstrap; intervals are 95 % percentile intervals over prompts.

    Returns:
        JSON-able: pairs, prompts, excluded (pairs with a reward that is not finite), heads, aggregation; accuracy,
        difference, margin, coverage by scorer; signals (right_or_wrong, own_or_foreign: AUROC), reliability, scoring,
        distance, head_summary, features. A value that cannot be computed is None, and `reasons` explains it by the
        key's path.

    Raises:
        ValueError: for shapes that differ, a wrong aggregation, or no pair with finite rewards.
    """
    spec = Aggregation.parse(aggregation).with_centre("none")
    compare = dict(compare or {})
    finite = finite_pairs(chosen, rejected, spec, std_ref, compare)
    if not finite.any():
        raise ValueError(f"evaluate_heads: expected pairs with finite rewards, got none among {len(finite)}")
    pairs = pairs_of(chosen, rejected, finite, spec, std_ref, unit)
    other = None if foreign is None else _foreign(foreign, pairs)
    groups = _labels(prompts, finite)
    options = {"resamples": resamples, "seed": seed}
    reasons: dict[str, str] = {}
    labels = None if sources is None else source_labels(sources, finite, reasons)
    others = {name: (c.double().cpu()[finite], r.double().cpu()[finite]) for name, (c, r) in compare.items()}
    sides = (pairs.scorers(pairs.chosen), pairs.scorers(pairs.rejected))
    rewards = {name: (sides[0][name], sides[1][name]) for name in sides[0]} | others
    num_prompts = int(groups.max()) + 1
    if num_prompts < 2:
        reasons["accuracy.*.low"] = "one prompt: nothing to resample"
    given_scores = None if scores is None else torch.cat([s.double().cpu()[finite] for s in scores])
    result: dict[str, Any] = {
        "pairs": int(finite.sum()),
        "prompts": num_prompts,
        "excluded": int((~finite).sum()),
        "heads": pairs.num_heads,
        "aggregation": str(spec),
        "accuracy": {name: _accuracy(*pair, groups, options) for name, pair in rewards.items()},
        "difference": _differences(rewards, list(others), groups, options),
        "margin": {name: _margin(*pair, labels) for name, pair in rewards.items()},
        "coverage": {name: _coverage(*pair) for name, pair in rewards.items()},
        "signals": {
            "right_or_wrong": _right_or_wrong(pairs, rewards, groups, options, reasons),
            "own_or_foreign": _own_or_foreign(pairs, foreign, other, groups, options, reasons),
        },
        "reliability": _reliability(pairs, rewards, groups, options, reasons),
        "scoring": _scoring(pairs, others, given_scores, labels, reasons),
        "distance": _distance(pairs, other, reasons),
        "head_summary": _head_summary(pairs, reasons),
        "features": None,
    }
    if features is None:
        reasons["features"] = "no features given"
    else:
        result["features"] = _features(features[0].cpu()[finite], features[1].cpu()[finite])
    result["reasons"] = reasons
    return result


def _labels(keys: Sequence[Hashable] | None, finite: Tensor) -> Tensor:
    """[P'] group labels 0..G-1 of the finite rows; without keys every row is its own group."""
    if keys is None:
        return torch.arange(int(finite.sum()))
    if len(keys) != len(finite):
        raise ValueError(f"evaluate_heads: expected {len(finite)} prompts and sources, one per pair, got {len(keys)}")
    return statistics.group_labels(key for key, good in zip(keys, finite.tolist(), strict=True) if good)


def pool_small_groups(labels: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Merge groups that are too small to be standardised alone.

    Groups of fewer than `least` rows become one; if that is still too small, the next smallest group joins it.

    Args:
        labels: [N] int64, the group of each row.
        least: rows that a group needs to stay separate.

    Returns:
        Labels [N] int64, and [N] bool: rows of merged groups.
    """
    found, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(stable=True)
    sizes = counts[order]
    before = sizes.cumsum(0) - sizes  # rows in smaller groups
    small = (sizes < least) | ((before < least) & (before > 0))
    if int(small.sum()) < 2:
        return labels, torch.zeros_like(labels, dtype=torch.bool)
    merged = torch.zeros_like(small).index_put((order,), small)[inverse]
    return torch.where(merged, found.min() - 1, labels), merged


def source_labels(keys: Sequence[Hashable], finite: Tensor, reasons: dict[str, str] | None = None) -> Tensor:
    """[P'] int64: the group in which each finite pair is standardised; `reasons` records merged sources."""
    labels = _labels(keys, finite)
    return _pooled(labels, SOURCE_PAIRS, "pairs", "margin.*", {} if reasons is None else reasons)


def _pooled(labels: Tensor, least: int, unit: str, path: str, reasons: dict[str, str]) -> Tensor:
    pooled, merged = pool_small_groups(labels, least)
    if merged.any():
        reasons[path] = (
            f"{len(labels[merged].unique())} of {len(labels.unique())} sources, {int(merged.sum())} {unit} in all, are "
            f"standardised together: fewer than {least} {unit} have no scale of their own"
        )
    return pooled


def _accuracy(chosen: Tensor, rejected: Tensor, groups: Tensor, options: dict[str, int]) -> dict[str, Any]:
    interval = statistics.pair_accuracy(chosen, rejected, groups, **options)
    return {**interval._asdict(), "ties": int((chosen == rejected).sum())}


def _differences(
    rewards: Mapping[str, tuple[Tensor, Tensor]], others: list[str], groups: Tensor, options: dict[str, int]
) -> dict[str, Any]:
    """Accuracy of each aggregated scorer minus that of the mean of heads and of every other model, paired."""
    ours = [name for name in rewards if name not in others and not name.startswith("head ")]
    result = {}
    for reference in [name for name in ("mean", *others) if name in rewards]:
        for name in ours:
            if name != reference:
                interval = statistics.accuracy_difference(rewards[name], rewards[reference], groups, **options)
                result[f"{name} - {reference}"] = interval._asdict()
    return result


def _margin(chosen: Tensor, rejected: Tensor, sources: Tensor | None) -> dict[str, float]:
    margin = statistics.normalised_margin(chosen, rejected, sources)
    low, middle, high = torch.quantile(margin, torch.tensor([0.05, 0.5, 0.95], dtype=margin.dtype)).tolist()
    return {
        "mean": margin.mean().item(),
        "std": margin.std(correction=0).item(),
        "p05": low,
        "median": middle,
        "p95": high,
    }


def _coverage(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """area: in squared reward units; normalised_area: in the scorer's pooled variance (pi if sides are unrelated)."""
    return {
        "area": statistics.ellipse_area(chosen, rejected),
        "normalised_area": statistics.normalised_area(chosen, rejected),
    }


def _right_or_wrong(
    pairs: Pairs,
    rewards: Mapping[str, tuple[Tensor, Tensor]],
    groups: Tensor,
    options: dict[str, int],
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Signal -> scorer -> AUROC of the signal for that scorer's errors; above 0.5 the signal is informative.

    The std of one head is None.
    """
    targets = [SINGLE] if pairs.num_heads == 1 else ["nominal", "mean"]
    if pairs.num_heads == 1:
        reasons["signals.*.std"] = UNTRAINED
    result: dict[str, Any] = {"std": None if pairs.num_heads == 1 else {}, "disagreement": {}, "small margin": {}}
    for target in targets:
        chosen, rejected = rewards[target]
        wrong = ~statistics.pair_correct(chosen, rejected)
        for name, signal in pairs.unsureness(chosen - rejected).items():
            path = f"signals.right_or_wrong.{name}.{target}"
            result[name][target] = _auroc(signal, wrong, groups, options, reasons, path)
    return result


def _auroc(
    signal: Tensor, positive: Tensor, groups: Tensor, options: dict[str, int], reasons: dict[str, str], path: str
) -> dict[str, Any]:
    interval = Interval(None, None, None)
    if bool((signal == signal[0]).all()):
        reasons[path] = "the signal is the same everywhere (one head, or a std that was never trained)"
    elif bool(positive.all()) or not bool(positive.any()):
        reasons[path] = "only one class: all pairs are right, or all are wrong"
    else:
        interval = statistics.auroc_interval(signal, positive, groups, **options)
    return interval._asdict()


def _foreign(sides: tuple[HeadOutput, HeadOutput], own: Pairs) -> Pairs:
    """The foreign pairs that have finite rewards."""
    finite = finite_pairs(*sides, own.spec, own.std_ref, {})
    if not finite.any():
        raise ValueError(f"evaluate_heads: foreign: expected pairs with finite rewards, got none among {len(finite)}")
    return pairs_of(*sides, finite, own.spec, own.std_ref, own.unit)


def _own_or_foreign(
    pairs: Pairs,
    foreign: tuple[HeadOutput, HeadOutput] | None,
    other: Pairs | None,
    groups: Tensor,
    options: dict[str, int],
    reasons: dict[str, str],
) -> dict[str, Any] | None:
    """Signal -> AUROC of foreign against own data. Each foreign pair counts as a prompt of its own."""
    path = "signals.own_or_foreign"
    if foreign is None or other is None:
        reasons[path] = "no foreign data given"
        return None
    ours, theirs = pairs.foreignness(), other.foreignness()
    their_groups = int(groups.max()) + 1 + torch.arange(len(other.chosen.mean))
    used = len(other.chosen.mean)
    result: dict[str, Any] = {"pairs": used, "excluded": len(foreign[0].mean) - used, "std": None}
    for name in ours:
        signal = torch.cat([ours[name], theirs[name]])
        is_foreign = torch.arange(len(signal)) >= len(ours[name])
        sides = len(ours[name]) // len(groups)  # 2 for signals of responses, 1 for signals of pairs
        labels = torch.cat([groups.repeat(sides), their_groups.repeat(sides)])
        result[name] = _auroc(signal, is_foreign, labels, options, reasons, f"{path}.{name}")
    return result


def _reliability(
    pairs: Pairs,
    rewards: Mapping[str, tuple[Tensor, Tensor]],
    groups: Tensor,
    options: dict[str, int],
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Signal -> bins with the nominal reward's accuracy; a constant signal has one bin. One head: std is None."""
    chosen, rejected = rewards["nominal" if pairs.num_heads > 1 else SINGLE]
    correct = statistics.pair_correct(chosen, rejected)
    signals = pairs.unsureness(chosen - rejected)
    result: dict[str, Any] = {"std": None}
    if "std" not in signals:
        reasons["reliability.std"] = UNTRAINED
    return result | {
        name: [
            {**row._asdict(), "accuracy": row.accuracy._asdict()}
            for row in statistics.reliability(signal, correct, groups, **options)
        ]
        for name, signal in signals.items()
    }


def _scoring(
    pairs: Pairs,
    others: Mapping[str, tuple[Tensor, Tensor]],
    given: Tensor | None,
    sources: Tensor | None,
    reasons: dict[str, str],
) -> dict[str, Any] | None:
    """BRME Fig. 5b. Heads are standardised one by one and then aggregated, so that pessimism shows as under-scoring."""
    rows = torch.zeros(0, dtype=torch.bool) if given is None else given.isfinite()
    if given is None or int(rows.sum()) < 2:
        reasons["scoring"] = "no given scores"
        return None
    labels = None
    if sources is not None:  # not every response has a score, so a source may be too small here only
        labels = torch.cat([sources, sources])[rows]
        labels = _pooled(labels, 2 * SOURCE_PAIRS, "responses", "scoring.scorers", reasons)
    both = pairs.both
    z = statistics.standardise(both.mean[rows], labels)
    scorers = pairs.scorers(Side(z, both.std[rows]))
    scorers |= {name: statistics.standardise(torch.cat(pair)[rows], labels) for name, pair in others.items()}
    target = statistics.standardise(given[rows], labels)
    result: dict[str, Any] = {"responses": int(rows.sum()), "scorers": {}}
    for name, reward in scorers.items():
        gap = reward - target
        result["scorers"][name] = {
            "under": (gap < 0).double().mean().item(),
            "over": (gap > 0).double().mean().item(),
            "mean_gap": gap.mean().item(),
            "rank_correlation": statistics.rank_correlation(reward, target),
        }
    first = next(iter(scorers.values()))
    std = pairs.nominal_std(Side(both.mean[rows], both.std[rows]))
    error = (first - target).abs()
    result["std_against_error"] = None if pairs.num_heads == 1 else statistics.rank_correlation(std, error)
    if result["std_against_error"] is None:
        constant = "the std or the error is the same everywhere"
        reasons["scoring.std_against_error"] = UNTRAINED if pairs.num_heads == 1 else constant
    return result


def _distance(pairs: Pairs, other: Pairs | None, reasons: dict[str, str]) -> dict[str, Any] | None:
    """Side -> median and 95 % quantile of its distances, and the share beyond 1: .05 of reference responses."""
    sides = {"chosen": pairs.chosen, "rejected": pairs.rejected} | ({} if other is None else {"foreign": other.both})
    result = {}
    for name, side in sides.items():
        if side.distance is None:
            reasons["distance"] = "the model has no trust region: prudent calibrate fits one"
            return None
        median, high = torch.quantile(side.distance, torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        result[name] = {"median": median, "p95": high, "beyond": (side.distance > 1).double().mean().item()}
    return result


def _head_summary(pairs: Pairs, reasons: dict[str, str]) -> dict[str, Any]:
    """Correlations between heads (rewards over responses, margins over pairs), and statistics of each head."""
    both = pairs.both
    own = torch.eye(pairs.num_heads, dtype=torch.float64)
    # the share of responses on which a head is the nominal one: the nominal "reward" of one-hot means, averaged
    shares = [nominal_reward(own[k].expand_as(both.std), both.std, pairs.spec, pairs.std_ref) for k in range(len(own))]
    matrices = {
        "reward": statistics.correlation(both.mean),
        "margin": statistics.correlation(pairs.chosen.mean - pairs.rejected.mean),
    }
    if any(bool(m.isnan().any()) for m in matrices.values()):
        reasons["head_summary.correlation"] = "a head gives the same reward everywhere"
    return {
        "correlation": {name: _no_nan(matrix) for name, matrix in matrices.items()},
        "mean": both.mean.mean(dim=0).tolist(),
        "spread": both.mean.std(dim=0, correction=0).tolist(),
        "std": both.std.mean(dim=0).tolist(),
        "nominal_share": [share.mean().item() for share in shares],
    }


def _no_nan(matrix: Tensor) -> list[list[float | None]]:
    return [[None if x != x else x for x in row] for row in matrix.tolist()]


def _features(chosen: Tensor, rejected: Tensor) -> dict[str, Any]:
    step = -(-len(chosen) // RANK_ROWS)
    sample = torch.cat([chosen[::step], rejected[::step]])
    return {
        "effective_rank": statistics.effective_rank(sample),
        "effective_rank_rows": len(sample),
        "width": chosen.shape[1],
        "norm": statistics.norm_dispersion(chosen, rejected),
    }
