"""Best-of-n against each reward: from the reference policy, and from mixtures with a share of foreign candidates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...evaluation.best_of_n import best_of_n_weights

REFERENCE = "reference"


def mixture(share: float) -> str:
    """The name of the attack over candidates of which `share` are foreign."""
    return f"{100 * share:g}% foreign"


def pools(candidates: int, attacks: int, shares: Sequence[float]) -> dict[str, Tensor]:
    """Name of an attack -> numbers [N] of the candidates that each prompt's pool holds.

    Of N + A columns the first N are the reference policy's. A mixture has N too, of which the given share is foreign,
    half of it of each attack kind.
    """
    found = {REFERENCE: torch.arange(candidates)}
    for share in shares:
        foreign = round(share * candidates)
        if foreign > attacks:
            raise ValueError(f"shares: expected at most {attacks / candidates:g}, got {share:g}")
        own = torch.arange(candidates - foreign)
        found[mixture(share)] = torch.cat([own, torch.arange(candidates, candidates + foreign)])
    return found


def best_of_n(proxy: Tensor, gold: Tensor, ns: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The unbiased estimate of `evaluation.best_of_n.best_of_n_curve` for many rewards at once.

    Equal rewards, which only equal texts have, are not averaged.

    Args:
        proxy: [A, P, N] rewards that select.   gold: [P, N].

    Returns:
        gold [A, P, M] of the pick of each of M values of n; proxy [A, M] of the pick, mean over prompts, in the
        reward's own unit: its sd within a prompt above its mean, over the N candidates.
    """
    weights = _weights(proxy.shape[2], tuple(ns))
    order = torch.from_numpy(np.argsort(proxy.float().numpy(), axis=2))  # a third of the time of torch's
    ordered = proxy.double().gather(2, order)
    picked = gold.double().expand_as(proxy).gather(2, order) @ weights.T
    spread = ordered.var(dim=2, correction=0).mean(dim=1).sqrt()[:, None]
    level = ordered.mean(dim=(1, 2))[:, None]
    return picked, ((ordered @ weights.T).mean(dim=1) - level) / spread.clamp_min(1e-12)


@lru_cache(maxsize=8)
def _weights(candidates: int, ns: tuple[int, ...]) -> Tensor:
    return torch.stack([best_of_n_weights(candidates, n) for n in ns])
