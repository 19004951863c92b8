"""PET's objective (arXiv 2505.20556): a reward that best-of-n cannot exploit, so that it needs no KL.

    r^ = argmin_r  max_{pi in Pi_RS} { V_r(pi) - V_r(pi_ref) }  +  beta * L_D(r)

Pi_RS is the set of best-of-n policies of all rewards. The best-of-n policy of r itself attains the max, which leaves
one minimisation:

    E_x [ E_{y_1..y_n ~ pi_0} max_j r(x, y_j) - E_{y ~ pi_ref} r(x, y) ] + beta * L_D(r)

By the envelope theorem its gradient is the gradient at the arg-max: every step ranks the n samples without gradient and
scores the best one with it. Subtracting V_r(pi_ref) makes the objective independent of r -> r + c(x), along which it
would have no lower bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import bradley_terry
from .config import PETConfig

__all__ = ["PETConfig", "PETLoss", "best_samples", "pet_gap", "pet_loss", "takes_rejected"]


class PETLoss(NamedTuple):
    """loss = gap + beta * bt, each a scalar. gap: mean of best - reference, hinged as the config says."""

    loss: Tensor
    gap: Tensor
    bt: Tensor


def best_samples(rewards: Tensor) -> Tensor:
    """[X, n] rewards -> [X] int64, the best of each row; the lowest index on a tie. No gradient."""
    return rewards.detach().argmax(dim=1)


def pet_gap(best: Tensor, reference: Tensor, config: PETConfig) -> Tensor:
    """Mean over rows of r(best of n) - r(reference), hinged and detached as `config` says; 0 without rows.

    best, reference: [B] -> [].
    """
    if best.dim() != 1 or reference.shape != best.shape:
        raise ValueError(f"pet_gap: expected best and reference [B], got {list(best.shape)}, {list(reference.shape)}")
    gap = best - (reference.detach() if config.detach_reference else reference)
    if config.hinge == "none":
        total, rows = gap.sum(), gap.new_tensor(float(len(gap)))
    else:
        total = gap.relu().sum()  # not clamp, whose gradient at 0 is 1
        rows = (gap.detach() > 0).sum() if config.hinge == "active" else gap.new_tensor(float(len(gap)))
    return total / rows.clamp_min(1)


def pet_loss(
    best: Tensor,
    reference: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    config: PETConfig,
    margin: Tensor | None = None,
) -> PETLoss:
    """PET's objective on one batch: rewards of P pairs, and of the B of them whose prompts have samples.

    Args:
        best: [B] r(x, y_j*), differentiable, j* from `best_samples`.   reference: [B].
        chosen, rejected, margin: [P], of the Bradley-Terry loss.

    Raises:
        ValueError: for shapes outside the above.
    """
    gap = pet_gap(best, reference, config)
    bt = bradley_terry(chosen, rejected, margin)
    return PETLoss(gap + config.beta * bt, gap, bt)


def takes_rejected(step: int, pairs: int, config: PETConfig) -> Tensor:
    """[P] bool: the pairs whose reference response is the rejected one at this step (`reference: dataset`)."""
    if config.reference != "dataset":
        return torch.zeros(pairs, dtype=torch.bool)
    generator = torch.Generator().manual_seed((config.seed << 32) + step)
    return torch.rand(pairs, generator=generator) < 0.5
