"""The trust region of `ensemble_reward`: the distance from the reference responses and its price, in plain torch.

README.md has the formulas; reference.py calls them, and the other executions are tested against them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..exact import times
from .spec import Aggregation

TRUST_DIRECTIONS = 32  # R of a fitted region, unless another is asked for


class TrustRegion(NamedTuple):
    """Where the reward was taught: the reference responses' features f as a mean and a precision of low rank plus
    diagonal, scaled so that distance 1 is the 95 % quantile of the reference responses.

        D2 = sum_d precision_d (f_d - mean_d)^2 + sum_r weights_r (directions_r . (f - mean))^2
        distance = sqrt(max(D2, 0))

    mean        [D]     of f: of `hidden`, or with `norm_weight` of the normed state, hidden * rstd * norm_weight
    precision   [D]     >= 0
    directions  [R, D]  R may be 0
    weights     [R]     of any sign: PPCA has 1 / lambda_r - 1 / sigma^2 < 0
    unit        [1]     > 0, the reward units of the price: the sd of the mean head within a prompt
    rms         [1]     > 0, with `norm_weight` the typical root mean square of `hidden`; else unread. Only rounding
                        depends on it: the fused executions subtract mean * rms from hidden * norm_weight, then square.

    fp32, or fp64 with fp64 `hidden`; on `hidden`'s device. They get no gradient.
    """

    mean: Tensor
    precision: Tensor
    directions: Tensor
    weights: Tensor
    unit: Tensor
    rms: Tensor

    def to_dtype(self, dtype: torch.dtype) -> TrustRegion:
        return TrustRegion(*(tensor.to(dtype) for tensor in self))


class Measured(NamedTuple):
    """The distance's parts for N rows, and what its gradient needs; `squared` may be negative with weights < 0."""

    gap: Tensor  # [N, D] f - mean
    projections: Tensor  # [N, R] directions . gap
    squared: Tensor  # [N] D2
    along: Tensor  # [N] mean' P gap, P the precision matrix: D2 + along = f' P gap, the norm's term of the gradient

    @property
    def distance(self) -> Tensor:
        """[N]; NaN stays NaN."""
        return self.squared.clamp(min=0).sqrt()


def measure(features: Tensor, trust: TrustRegion) -> Measured:
    """Features f [N, D], after the norm -> the distance's parts, in the features' dtype."""
    region = trust.to_dtype(features.dtype)
    gap = features - region.mean
    projections = times(gap, region.directions.T)
    pull = region.weights * projections  # [N, R]
    weighted = region.precision * gap
    squared = (weighted * gap).sum(dim=1) + (pull * projections).sum(dim=1)
    along = (weighted * region.mean).sum(dim=1) + (pull * (region.directions * region.mean).sum(dim=1)).sum(dim=1)
    return Measured(gap, projections, squared, along)


def price(distance: Tensor, unit: Tensor, spec: Aggregation) -> Tensor:
    """[N]: c * unit * max(distance - from, 0)^power, which the reward loses."""
    assert spec.trust is not None
    beyond = (distance - spec.trust_from).clamp(min=0)
    return spec.trust * unit.to(distance.dtype) * beyond**spec.trust_power


def price_gradient(distance: Tensor, unit: Tensor, spec: Aggregation) -> Tensor:
    """[N]: d price / d distance; 0 at the edge of a hinge."""
    assert spec.trust is not None
    beyond = distance - spec.trust_from
    slope = spec.trust * spec.trust_power * unit.to(distance.dtype) * beyond ** (spec.trust_power - 1)
    return torch.where(beyond <= 0, torch.zeros_like(slope), slope)


def features_gradient(d_distance: Tensor, measured: Measured, trust: TrustRegion) -> Tensor:
    """[N] gradient at the distance -> [N, D] gradient at f: P (f - mean) d_distance / distance, 0 at distance 0."""
    region = trust.to_dtype(measured.gap.dtype)
    distance = measured.distance
    scale = torch.where(distance == 0, torch.zeros_like(distance), d_distance / distance)[:, None]
    pulled = times(region.weights * measured.projections, region.directions)
    return scale * (region.precision * measured.gap + pulled)
