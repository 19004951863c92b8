"""Compute the rewards and uncertainty signals of K heads on preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...kernels import Aggregation, aggregate, nominal_reward

SINGLE = "single head"
UNTRAINED = "one head: Bradley-Terry does not train its std"


class HeadOutput(Protocol):
    """The mean and std of K heads for N responses; `EnsembleOutput` and `Scores` are examples.

    A model with a trust region has `distance` [N] too.
    """

    @property
    def mean(self) -> Tensor: ...  # [N, K]
    @property
    def std(self) -> Tensor: ...  # [N, K]


class Side(NamedTuple):
    """The heads' outputs [P, K] on one side of P pairs, on the CPU; the distance [P] of a model with a trust region."""

    mean: Tensor
    std: Tensor
    distance: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """The heads' outputs on both sides of P pairs in fp64, all finite, and how the heads become one reward.

    unit: [1] of the trust region, which prices the distance; None without one.
    """

    chosen: Side
    rejected: Side
    spec: Aggregation
    std_ref: Tensor | None
    unit: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.chosen.mean.shape[1]

    @property
    def both(self) -> Side:
        """[2P, K]: the chosen rows, then the rejected ones."""
        columns = zip(self.chosen, self.rejected, strict=True)
        return Side(*(None if a is None or b is None else torch.cat([a, b]) for a, b in columns))  # type: ignore[arg-type]

    def scorers(self, side: Side, heads: bool = True) -> dict[str, Tensor]:
        """Scorer name -> [N] rewards of one side: nominal, mean, worst, the aggregation, and each head.

        A price of distance is in the aggregation alone, which is left out for a side without distance.
        """
        mean, std, _ = side
        if self.num_heads == 1:  # every aggregation of one head is that head, less a price
            return {SINGLE: mean[:, 0]} | self._priced(side)
        result = {"nominal": nominal_reward(mean, std, self.spec, self.std_ref)}
        if self.std_ref is not None and "relative_std" not in self.spec.nominal and self.std_ref.unique().numel() > 1:
            relative = Aggregation("nominal", nominal="relative_std")
            result["nominal (relative std)"] = nominal_reward(mean, std, relative, self.std_ref)
        result["mean"] = mean.mean(dim=1)
        result["worst"] = mean.min(dim=1).values
        if self.spec.trust is None and self.spec.kind not in ("nominal", "mean", "min"):
            result[str(self.spec)] = aggregate(mean, std, mean, self.spec, self.std_ref)
        result |= self._priced(side)
        if heads:
            result |= {f"head {k}": mean[:, k] for k in range(self.num_heads)}
        return result

    def _priced(self, side: Side) -> dict[str, Tensor]:
        if self.spec.trust is None or side.distance is None:
            return {}
        mean, std, distance = side
        return {str(self.spec): aggregate(mean, std, mean, self.spec, self.std_ref, distance, self.unit)}

    def nominal_std(self, side: Side) -> Tensor:
        """[N]: the std of the nominal head (with nominal=mean: the mean of the heads' stds)."""
        return nominal_reward(side.std, side.std, self.spec, self.std_ref)

    def unsureness(self, margin: Tensor) -> dict[str, Tensor]:
        """Signals [P] that a pair is ranked wrong; larger means less certain. margin [P]: the scorer's.

        std: predicted std of the difference of the two nominal rewards; disagreement: population std of the heads'
        margins; small margin: minus the margin's size. One head has no std, which Bradley-Terry does not train.
        """
        std = (self.nominal_std(self.chosen).square() + self.nominal_std(self.rejected).square()).sqrt()
        spread = (self.chosen.mean - self.rejected.mean).std(dim=1, correction=0)
        return self._std(std) | {"disagreement": spread, "small margin": -margin.abs()}

    def _std(self, std: Tensor) -> dict[str, Tensor]:
        return {} if self.num_heads == 1 else {"std": std}

    def foreignness(self) -> dict[str, Tensor]:
        """Signals of foreign data: std, disagreement and distance of each response [2P], small margin of each pair [P].

        One head has no std, which Bradley-Terry does not train; a model without a trust region has no distance.
        """
        both = self.both
        name, chosen = next(iter(self.scorers(self.chosen, heads=False).items()))
        margin = chosen - self.scorers(self.rejected, heads=False)[name]
        return self._std(self.nominal_std(both)) | {
            "disagreement": both.mean.std(dim=1, correction=0),
            "small margin": -margin.abs(),
            **({} if both.distance is None else {"distance": both.distance}),
        }


def finite_pairs(
    chosen: HeadOutput,
    rejected: HeadOutput,
    spec: Aggregation,
    std_ref: Tensor | None,
    compare: Mapping[str, tuple[Tensor, Tensor]],
) -> Tensor:
    """[P] bool: which pairs have finite rewards on both sides from every scorer."""
    shape = chosen.mean.shape
    if chosen.mean.dim() != 2 or any(t.shape != shape for t in (chosen.std, rejected.mean, rejected.std)):
        got = [list(t.shape) for t in (chosen.mean, chosen.std, rejected.mean, rejected.std)]
        raise ValueError(f"evaluate_heads: expected mean and std of chosen and rejected of one shape [P, K], got {got}")
    spec.check_heads(shape[1])
    if "relative_std" in spec.nominal and std_ref is None:
        raise ValueError("evaluate_heads: std_ref: expected each head's typical std for nominal=relative_std, got None")
    finite = torch.ones(shape[0], dtype=torch.bool)
    for tensor in (chosen.mean, chosen.std, rejected.mean, rejected.std):
        finite &= tensor.cpu().isfinite().all(dim=1)
    for side in (chosen, rejected):
        distance = getattr(side, "distance", None)
        if distance is not None:
            finite &= distance.cpu().isfinite()
    for name, pair in compare.items():
        for tensor in pair:
            if tensor.shape != shape[:1]:
                raise ValueError(
                    f"evaluate_heads: compare {name!r}: expected shape {[shape[0]]}, got {list(tensor.shape)}"
                )
            finite &= tensor.cpu().isfinite()
    return finite


def pairs_of(
    chosen: HeadOutput,
    rejected: HeadOutput,
    rows: Tensor,
    spec: Aggregation,
    std_ref: Tensor | None,
    unit: Tensor | None = None,
) -> Pairs:
    """Return the pairs that `rows` [P] bool selects."""

    def kept(numbers: Tensor | None) -> Tensor | None:
        return None if numbers is None else numbers.detach().double().cpu()[rows]

    sides = [
        Side(kept(s.mean), kept(s.std), kept(getattr(s, "distance", None)))  # type: ignore[arg-type]
        for s in (chosen, rejected)
    ]
    std_ref, unit = (None if t is None else t.detach().double().cpu() for t in (std_ref, unit))
    return Pairs(sides[0], sides[1], spec, std_ref, unit)
