"""Solve many L2-regularised Bradley-Terry problems on the same pairs at once, exactly, by Newton's method.

The problems differ in the weights of the pairs (folds) and in the penalty. Newton steps are found by conjugate
gradients (Nocedal & Wright, Numerical Optimization, algorithm 7.1): a step of all C problems is a few matrix products
with the pairs [P, R], and no problem has a Hessian of its own. The preconditioner is the bound of Boehning and Lindsay
(1988), X'X / 4 + penalty, factored once a penalty: sigma (1 - sigma) <= 1/4, and nearly equal for all pairs of a noisy
problem, so that few products do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FACTORED = 4096  # largest R whose X'X is factored; above, its diagonal preconditions
_BOUND = 0.25  # of sigma (1 - sigma)
_MAX_STEPS = 200  # separable pairs with a tiny penalty need about 30
_MAX_PRODUCTS = 200  # of one step's conjugate gradients
_SUFFICIENT = 1e-4  # of the decrease that the gradient promises (Armijo)


class Solution(NamedTuple):
    """weight [R, C]; logit [P, C] = x @ weight - margin; steps: Newton steps taken; gap [C]: about how far each loss is
    from its least value, per unit of the pairs' weight."""

    weight: Tensor
    logit: Tensor
    steps: int
    gap: Tensor


class Preconditioner:
    """r -> (curvature / 4 + penalty)^-1 r, for curvature X'X [R, R] or its diagonal [R]; factors are kept."""

    def __init__(self, curvature: Tensor) -> None:
        self._quarter = _BOUND * curvature
        self._factors: dict[float, Tensor] = {}

    def __call__(self, residual: Tensor, penalty: Tensor) -> Tensor:
        """residual [R, C], penalty [C] in which equal values are neighbours."""
        if self._quarter.dim() == 1:
            return residual / (self._quarter[:, None] + penalty)
        values, sizes = penalty.unique_consecutive(return_counts=True)
        parts = residual.split(sizes.tolist(), dim=1)
        solved = [
            torch.cholesky_solve(part, self._factor(value)) for part, value in zip(parts, values.tolist(), strict=True)
        ]
        return torch.cat(solved, dim=1)

    def _factor(self, penalty: float) -> Tensor:
        if penalty not in self._factors:
            matrix = self._quarter.clone()
            matrix.diagonal().add_(penalty)
            self._factors[penalty] = torch.linalg.cholesky(matrix)
        return self._factors[penalty]


def solve(
    x: Tensor,
    margin: Tensor,
    weight: Tensor,
    penalty: Tensor,
    curvature: Tensor,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-10,
) -> Solution:
    """Minimise, for each problem c, sum_p weight_pc softplus(-(x_p w_c - margin_p)) + penalty_c / 2 |w_c|^2.

    Args:
        x: [P, R] fp64.   margin: [P].   weight: [P, C], >= 0.
        penalty: [C], > 0; equal values are neighbours.
        curvature: X'X [R, R] or its diagonal [R]; it changes the time, not the result.
        start: [R, C] to begin at; None: 0.
        tolerance: largest `gap`.
    """
    precondition = Preconditioner(curvature)
    total = weight.sum(dim=0)
    w = x.new_zeros(x.shape[1], weight.shape[1]) if start is None else start.clone()
    logit = x @ w - margin[:, None]
    gap = torch.full_like(total, float("inf"))
    steps, left = 0, torch.arange(len(penalty), device=x.device)  # left: the problems that are not solved yet
    while True:
        sigma = torch.sigmoid(-logit[:, left])
        gradient = penalty[left] * w[:, left] - x.T @ (weight[:, left] * sigma)
        second = weight[:, left] * sigma * (1 - sigma)
        flatter = (_BOUND * total[left] / second.sum(dim=0)).clamp(min=1)  # than the preconditioner: a larger gap
        gap[left] = flatter * (gradient * precondition(gradient, penalty[left])).sum(dim=0) / (2 * total[left])
        keep = gap[left] > tolerance
        left = left[keep]
        if steps == _MAX_STEPS or not len(left):
            return Solution(w, logit, steps, gap)
        gradient, price = gradient[:, keep], penalty[left]
        step, change = _newton_step(x, second[:, keep], price, precondition, gradient, gap[left])
        slope = (gradient * step).sum(dim=0)
        length = _line_search(logit[:, left], w[:, left], weight[:, left], price, step, change, slope)
        w[:, left] += length * step
        logit[:, left] += length * change
        steps += 1


def _newton_step(
    x: Tensor, second: Tensor, penalty: Tensor, precondition: Preconditioner, gradient: Tensor, gap: Tensor
) -> tuple[Tensor, Tensor]:
    """The solution [R, C] of (X' diag(second) X + penalty) step = -gradient, and x @ step [P, C]: as exact as the gap
    deserves, so that the steps converge faster than linearly."""
    step, change = torch.zeros_like(gradient), torch.zeros_like(second)
    residual = -gradient
    scaled = precondition(residual, penalty)
    direction = scaled
    size = (residual * scaled).sum(dim=0)
    enough = size * gap.clamp(max=0.1)
    for _ in range(_MAX_PRODUCTS):
        going = size > enough
        if not bool(going.any()):
            break
        along = x @ direction
        bent = x.T @ (second * along) + penalty * direction
        length = torch.where(going, size / (direction * bent).sum(dim=0), 0.0)
        step += length * direction
        change += length * along
        residual = residual - length * bent
        scaled = precondition(residual, penalty)
        before, size = size, torch.where(going, (residual * scaled).sum(dim=0), size)
        direction = scaled + torch.where(going, size / before, 0.0) * direction
    return step, change


def _line_search(
    logit: Tensor, w: Tensor, weight: Tensor, penalty: Tensor, step: Tensor, change: Tensor, slope: Tensor
) -> Tensor:
    """[C] lengths in (0, 1]: halved until the loss falls by its share of what the slope promises."""

    def loss(length: Tensor) -> Tensor:
        fit = (weight * F.softplus(-(logit + length * change))).sum(dim=0)
        return fit + penalty / 2 * (w + length * step).square().sum(dim=0)

    length = torch.ones_like(slope)
    start = loss(torch.zeros_like(slope))
    rounding = 1e-14 * start.abs()  # the last steps change the loss by less than its rounding
    for _ in range(40):
        high = loss(length) > start + _SUFFICIENT * length * slope + rounding
        if not bool(high.any()):
            break
        length = torch.where(high, length / 2, length)
    return length
