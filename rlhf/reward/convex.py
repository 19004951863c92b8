"""The Bradley-Terry head as the exact solution of its convex problem, with the L2 penalty chosen on held-out prompts.

With x the difference of a pair's standardised features and T the mean of |x|^2 over the pairs, one head w minimises

    mean over pairs of -log sigma(w . x - margin)  (BRME, arXiv 2409.15360, eq. 3)  +  l2 T / 2 |w|^2.

T makes the penalty free of scale: l2 weighs the mean square of a pair's reward difference (of a w without preferred
direction), whatever the features' units, number and copies, so that one grid serves every trunk. It is the prior of a
reward difference with variance 1 / (P l2); a fold's fit keeps the prior of all P pairs, as more pairs change the
likelihood and not the prior.

Each prompt is held out once; the penalty with the least held-out log-loss is chosen, and the head is fitted again on
all pairs. On a frozen trunk this fit is the whole of training: nothing depends on a learning rate, an order or a start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...engine.head import EnsembleHead
from ...kernels import STD_FLOOR
from .config import L2_GRID
from .fit import Scaling, check_features, standardise
from .newton import FACTORED, solve

_BEYOND = 4  # values, two a decade, that are added beyond an end of the grid where the least log-loss is
_L2_RANGE = (1e-10, 1e3)  # at most; a pair's reward difference then has a prior std of 1e5 or .03 over sqrt(P)
_BLOCK = 1 << 24  # elements of the differences that are computed at once
_COLUMNS = 1 << 26  # elements of [P, problems] that are solved at once: 512 MB each
_CHOICE = 1e-13  # nats a pair: how exact the folds' fits are; their held-out log-losses are then to about 1e-6
_EXACT = 1e-18  # the same of the final fit, whose rewards are then exact to about 1e-9


class CurvePoint(NamedTuple):
    """The held-out log-loss (nats a pair) of one l2, and its standard error over prompts (over pairs, if these are
    held out)."""

    l2: float
    log_loss: float
    standard_error: float


class Posterior:
    """Laplace's approximation: w ~ N(w*, H^-1), H the Hessian of P times the loss at its minimum w*."""

    def __init__(self, scaling: Scaling, data: _Pairs, logit: Tensor, penalty: float) -> None:
        sigma = torch.sigmoid(-logit)
        hessian = data.x.T @ (data.weight[:, None] * sigma * (1 - sigma) * data.x)
        hessian.diagonal().add_(penalty)
        self._scaling, self._penalty = scaling, penalty
        self._factor = torch.linalg.cholesky(hessian)
        self._dual = (data.x, data.differences) if data.dual else None

    def std(self, features: Tensor, centre: Tensor | None = None) -> Tensor:
        """[N] fp64: the posterior std of reward(features [N, D]) - reward(centre).

        Bradley-Terry determines differences of rewards only. centre: [D] or [N, D]; None: the mean of the training
        responses. Directions in which no pair differs keep the prior's variance.
        """
        x = self._scaling(features).double()
        if centre is not None:
            x = x - self._scaling(centre).double()
        inside, outside = x.T, torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if self._dual is not None:
            root, differences = self._dual
            inside = torch.linalg.solve_triangular(root, differences @ x.T, upper=False)
            outside = (x.square().sum(dim=1) - inside.square().sum(dim=0)).clamp(min=0)
        solved = torch.linalg.solve_triangular(self._factor, inside, upper=False)
        variance: Tensor = solved.square().sum(dim=0) + outside / self._penalty
        return variance.sqrt()


@dataclass(frozen=True)
class RidgeFit:
    """A fitted head and how its penalty was chosen.

    head: one head on raw features, its mean reward 0 on the training responses; its std is a constant without meaning.
    l2: the chosen penalty.   curve: ascending in l2; empty if there was nothing to choose.
    folds: number of folds, 0 without a choice.   held_out: what a fold holds out: "prompt", or "pair" where all pairs
    have one prompt.   edge: "low" or "high" if the least log-loss is at an end of the grid even after it was extended.
    iterations: Newton steps of the final fit.   log_loss: of all pairs, in nats a pair, after the final fit.
    posterior: if asked for.
    """

    head: EnsembleHead
    l2: float
    curve: list[CurvePoint]
    folds: int
    held_out: str
    edge: str | None
    iterations: int
    log_loss: float
    posterior: Posterior | None = None

    def summary(self) -> dict[str, Any]:
        """The choice as JSON."""
        return {
            "l2": self.l2,
            "folds": self.folds,
            "held_out": self.held_out,
            "edge": self.edge,
            "log_loss": self.log_loss,
            "iterations": self.iterations,
            "curve": [point._asdict() for point in self.curve],
        }


class _Pairs(NamedTuple):
    """The pairs in at most min(P, D) coordinates in which |w| is what it is in features.

    x [P, R] fp64: standardised differences, or with P < D the Cholesky factor of their Gram matrix; differences [P, D]:
    the former.   curvature: of x, for `solve`.   mean_square: T.   margin, weight [P] fp64.
    """

    x: Tensor
    differences: Tensor
    curvature: Tensor
    mean_square: float
    margin: Tensor
    weight: Tensor

    @property
    def dual(self) -> bool:
        return self.x is not self.differences

    def to_features(self, w: Tensor) -> Tensor:
        """[R] -> [D]."""
        if not self.dual:
            return w
        combination: Tensor = torch.linalg.solve_triangular(self.x.T, w[:, None], upper=True)
        return (self.differences.T @ combination)[:, 0]


def fit_ridge(
    chosen: Tensor,
    rejected: Tensor,
    prompts: Tensor,
    *,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    grid: Sequence[float] = L2_GRID,
    folds: int = 5,
    seed: int = 0,
    std_floor: float = STD_FLOOR,
    posterior: bool = False,
) -> RidgeFit:
    """Fit one Bradley-Terry head with the L2 penalty whose held-out log-loss is least.

    Args:
        chosen, rejected: [P, D] features, any floating dtype; the arithmetic is fp64 on their device.
        prompts: [P] integer labels; pairs of one prompt are always in the same fold.
        margin: [P]; None: 0.   weight: [P] >= 0, of each pair's loss; None: 1.
        grid: penalties to choose from; one value is used without a choice. If the least log-loss is at an end, the grid
            is extended (to 1e-10 and 1e3 at most).
        folds: at most the number of prompts. If all pairs have one prompt, pairs are held out instead: their shared
            responses make that log-loss too low, and so the penalty.
        seed: of the folds.
        posterior: also keep what `RidgeFit.posterior` needs, [R, R] with R the least of P and D.

    Raises:
        ValueError: for inputs outside the above, NaN or infinity; if no pair's two sides differ.
    """
    check_features(chosen, rejected, "")
    pairs = len(chosen)
    _check_labels(pairs, prompts, margin, weight)
    values = _checked_grid(grid)
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds: expected a whole number above 1, got {folds!r}")
    if posterior and min(chosen.shape) > FACTORED:
        raise ValueError(f"posterior: expected at most {FACTORED} pairs or features, got {list(chosen.shape)}")
    scaling = standardise(chosen, rejected)
    data = _prepare(chosen, rejected, scaling, margin, weight)
    fold, held_out = _folds(prompts, pairs, folds, seed)
    fold = fold.to(chosen.device)
    curve: list[CurvePoint] = []
    edge, start, number = None, None, 0
    if len(values) > 1 and pairs > 1:
        curve, start, edge = _choose(data, fold, values, prompts if held_out == "prompt" else None)
        number = int(fold.max()) + 1
    l2 = values[len(values) // 2] if not curve else min(curve, key=lambda point: point.log_loss).l2
    weights = data.weight[:, None]
    penalty = _penalty(data, [l2])
    found = solve(data.x, data.margin, weights, penalty, data.curvature, start=start, tolerance=_EXACT)
    w = found.weight[:, 0]
    return RidgeFit(
        head=_head(data.to_features(w), scaling, std_floor),
        l2=l2,
        curve=curve,
        folds=number,
        held_out=held_out,
        edge=edge,
        iterations=found.steps,
        log_loss=float((weights * F.softplus(-found.logit)).sum() / weights.sum()),
        posterior=Posterior(scaling, data, found.logit, float(penalty)) if posterior else None,
    )


def _prepare(
    chosen: Tensor, rejected: Tensor, scaling: Scaling, margin: Tensor | None, weight: Tensor | None
) -> _Pairs:
    device, (count, dim) = chosen.device, chosen.shape
    margin, weight = (
        torch.full((count,), fill, dtype=torch.float64, device=device) if given is None else given.to(device).double()
        for given, fill in ((margin, 0.0), (weight, 1.0))
    )
    inverse = scaling.inverse.double()
    differences = torch.empty(count, dim, dtype=torch.float64, device=device)
    rows = max(1, _BLOCK // dim)
    for target, a, b in zip(*(side.split(rows) for side in (differences, chosen, rejected)), strict=True):
        torch.mul(a.double() - b.double(), inverse, out=target)
    squares = torch.cat([part.square().sum(dim=1) for part in differences.split(rows)])
    mean_square = float((weight @ squares) / weight.sum())
    if not mean_square > 0:
        raise ValueError("pairs: expected a pair whose two sides have different features, got none")
    x = _root(differences @ differences.T) if count < dim and count <= FACTORED else differences
    curvature = x.T @ x if x.shape[1] <= FACTORED else torch.stack([c.square().sum() for c in x.split(1, dim=1)])
    return _Pairs(x, differences, curvature, mean_square, margin, weight)


def _root(gram: Tensor) -> Tensor:
    """L [P, P] lower triangular with LL' = gram, to which as little is added on the diagonal as rounding demands."""
    jitter = 1e-13 * float(gram.diagonal().mean())
    factor: Tensor
    while True:
        matrix = gram.clone()
        matrix.diagonal().add_(jitter)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor
        jitter *= 10


def _penalty(data: _Pairs, values: Sequence[float]) -> Tensor:
    """[L] the factor of |w|^2 / 2 beside the sum over all pairs' losses."""
    scale = float(data.weight.sum()) * data.mean_square
    return torch.tensor(values, dtype=torch.float64, device=data.x.device) * scale


def _choose(
    data: _Pairs, fold: Tensor, values: list[float], prompts: Tensor | None
) -> tuple[list[CurvePoint], Tensor, str | None]:
    """The curve over the grid, extended while its least value is at an end; the folds' mean weights [R, 1] of the best
    l2; and the end at which the extension stopped, if it did."""
    losses: dict[float, Tensor] = {}
    weights: dict[float, Tensor] = {}
    wanted, edge = values, None
    while wanted:
        for l2, (loss, w) in zip(wanted, _held_out(data, fold, wanted), strict=True):
            losses[l2], weights[l2] = loss, w
        curve = [_point(l2, losses[l2], data.weight, prompts) for l2 in sorted(losses)]
        best = min(range(len(curve)), key=lambda i: curve[i].log_loss)
        wanted, edge = _extension([point.l2 for point in curve], best)
    return curve, weights[curve[best].l2], edge


def _extension(grid: list[float], best: int) -> tuple[list[float], str | None]:
    """The next values beyond the end of the grid at which the best one is; the end, if there is no room beyond it."""
    if 0 < best < len(grid) - 1:
        return [], None
    low = best == 0
    steps = [(-k if low else k) / 2 for k in range(1, _BEYOND + 1)]
    more = [float(f"{grid[best] * 10**step:.1g}") for step in steps]
    more = [value for value in more if _L2_RANGE[0] <= value <= _L2_RANGE[1]]
    return (sorted(more), None) if more else ([], "low" if low else "high")


def _held_out(data: _Pairs, fold: Tensor, values: list[float]) -> list[tuple[Tensor, Tensor]]:
    """For each l2: each pair's loss [P] under the fit without its fold, and the folds' mean weights [R, 1]."""
    number = int(fold.max()) + 1
    train = data.weight[:, None] * (fold[:, None] != torch.arange(number, device=fold.device))  # [P, K]
    result = []
    at_once = max(1, _COLUMNS // (len(fold) * number))
    for first in range(0, len(values), at_once):
        part = values[first : first + at_once]
        penalty = _penalty(data, part).repeat_interleave(number)
        found = solve(data.x, data.margin, train.repeat(1, len(part)), penalty, data.curvature, tolerance=_CHOICE)
        for i in range(len(part)):
            logit = found.logit.gather(1, (fold + i * number)[:, None])[:, 0]
            w = found.weight[:, i * number : (i + 1) * number].mean(dim=1, keepdim=True)
            result.append((F.softplus(-logit), w))
    return result


def _point(l2: float, losses: Tensor, weight: Tensor, prompts: Tensor | None) -> CurvePoint:
    """The weighted mean of the pairs' losses, and its standard error over groups (a ratio estimator's)."""
    total = weight.sum()
    mean = (weight * losses).sum() / total
    residual = weight * (losses - mean)
    if prompts is not None:
        groups = prompts.to(losses.device).unique(return_inverse=True)[1]
        residual = torch.zeros(int(groups.max()) + 1, dtype=residual.dtype, device=residual.device).index_add_(
            0, groups, residual
        )
    size = len(residual)
    error = (residual.square().sum() * size / (size - 1)).sqrt() / total
    return CurvePoint(l2, float(mean), float(error))


def _folds(prompts: Tensor, pairs: int, folds: int, seed: int) -> tuple[Tensor, str]:
    """[P] int64 fold numbers of about equal size, and what is held out whole: "prompt", or "pair" if there is one."""
    _, group, sizes = prompts.cpu().unique(return_inverse=True, return_counts=True)
    held_out = "prompt"
    if len(sizes) == 1:
        held_out, group, sizes = "pair", torch.arange(pairs), torch.ones(pairs, dtype=torch.int64)
    shuffled = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    order = shuffled[sizes[shuffled].argsort(descending=True, stable=True)]
    filled = [0] * min(folds, len(sizes))
    place = torch.empty(len(sizes), dtype=torch.int64)
    for g, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        least = filled.index(min(filled))
        place[g] = least
        filled[least] += size
    return place[group], held_out


def _head(w: Tensor, scaling: Scaling, std_floor: float) -> EnsembleHead:
    head = EnsembleHead(len(w), 1, aggregation="mean", std_floor=std_floor).to(w.device)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0] = w
    return scaling.fold_into(head)


def _check_labels(pairs: int, prompts: Tensor, margin: Tensor | None, weight: Tensor | None) -> None:
    for name, value in (("prompts", prompts), ("margin", margin), ("weight", weight)):
        if value is not None and tuple(value.shape) != (pairs,):
            raise ValueError(f"{name}: expected shape [{pairs}], got {list(value.shape)}")
    if prompts.is_floating_point() or prompts.dtype == torch.bool:
        raise ValueError(f"prompts: expected integer labels, got {prompts.dtype}")
    if margin is not None and not bool(margin.isfinite().all()):
        raise ValueError("margin: expected finite values, got NaN or infinity")
    if weight is not None and not (bool(weight.isfinite().all()) and bool((weight >= 0).all()) and weight.sum() > 0):
        raise ValueError("weight: expected finite values >= 0, not all 0")


def _checked_grid(grid: Sequence[float]) -> list[float]:
    values = sorted({float(value) for value in grid})
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"grid: expected finite penalties above 0, got {list(grid)}")
    return values
