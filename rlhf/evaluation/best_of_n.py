"""Best-of-n as an attack on a reward model: estimate the gold reward of its picks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest` itself."""
    return sorted({2**i for i in range(largest.bit_length()) if 2**i <= largest} | {largest})
