"""The arms: how fitted heads, their spread and the distance become one reward of each candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ....engine import EnsembleHead
from ....kernels import Aggregation, aggregate
from .heads import Fitted
from .world import Both

TUNED = "single, tuned"


class Arm(NamedTuple):
    """kind: see `reward`.   constant: of the kinds in `GRIDS`, else 0."""

    kind: str
    constant: float = 0.0

    @property
    def name(self) -> str:
        """In tables, "trust quad 1"."""
        return f"{self.kind} {self.constant:g}" if self.kind in GRIDS else self.kind

    @property
    def distant(self) -> bool:
        """Whether it reads a distance."""
        return self.kind.startswith("trust")


# kinds with a constant to choose, and the values to choose from
GRIDS = {
    "UWO": (0.1, 0.5, 2.5, 12.5),
    "posterior LCB": (0.3, 1.0, 3.0, 10.0),
    "trust quad": (0.1, 0.3, 1.0, 3.0, 10.0),
    "trust hinge": (1.0, 3.0, 10.0, 30.0, 100.0),
    "trust quad, tradeoff:0.4": (0.1, 0.3, 1.0, 3.0, 10.0),
}
# the papers' constants, and those of the first measurements
USUAL = {
    "UWO": 0.5,
    "posterior LCB": 1.0,
    "trust quad": 1.0,
    "trust hinge": 3.0,
    "trust quad, tradeoff:0.4": 1.0,
}
PLAIN = (
    TUNED,
    "single, shipped before",
    "ensemble mean",
    "ensemble WCO",
    "BRME nominal",
    "BRME tradeoff:0.4",
    "BRME worst",
    "PET",
    "BSR",
)


def every_arm(distant: bool) -> list[Arm]:
    """The arms that read a distance, or those that read none, with every constant."""
    plain = [] if distant else [Arm(kind) for kind in PLAIN]
    priced = [Arm(kind, constant) for kind, grid in GRIDS.items() for constant in grid]
    return plain + [arm for arm in priced if arm.distant == distant]


def reported_arms(chosen: Mapping[str, float]) -> list[Arm]:
    """The arms of a table: each kind with its usual constant and, if it is another, with the chosen one."""
    priced = [[Arm(kind, usual), Arm(kind, chosen[kind])] for kind, usual in USUAL.items()]
    return [*(Arm(kind) for kind in PLAIN), *dict.fromkeys(arm for arms in priced for arm in arms)]


class Scored(NamedTuple):
    """What all arms of a setting are made of: means and stds of heads [P, M, K], and within-prompt spreads."""

    mean: dict[str, Tensor]
    brme_std: Tensor
    posterior: Tensor
    unit: dict[str, float]


@torch.no_grad()
def score(fitted: Fitted, features: Both) -> Scored:
    """Apply every head to every candidate; `unit`: the sd of the mean head within a training prompt."""
    mean, unit, brme_std = {}, {}, torch.empty(0)
    shape = features.candidates.shape[:2]
    for name, head in fitted.heads.items():
        means, stds = _apply(head, features.candidates)
        mean[name] = means.view(*shape, -1)
        if name == "brme":
            brme_std = stds.view(*shape, -1)
        known = _apply(head, features.training)[0].mean(dim=1).view(features.training.shape[:2]).double()
        unit[name] = float(known.var(dim=1, correction=0).mean().sqrt())
    return Scored(mean, brme_std, fitted.posterior, unit)


def _apply(head: EnsembleHead, features: Tensor) -> tuple[Tensor, Tensor]:
    """[A, B, D] -> means, stds [A * B, K], calibrated."""
    out = head(features.flatten(0, 1), aggregation="mean")
    return out.mean, out.std


def reward(arm: Arm, scored: Scored, distance: Tensor | None = None) -> Tensor:
    """[P, M] rewards of one arm; distance [P, M], 1 at the edge of the reference responses, if it reads one."""
    tuned, brme = scored.mean["tuned"][..., 0], scored.mean["brme"]
    ensemble = scored.mean["ensemble"]
    c = arm.constant
    match arm.kind:
        case "single, tuned":
            return tuned
        case "single, shipped before" | "PET" | "BSR":
            return scored.mean[{"PET": "pet", "BSR": "bsr"}.get(arm.kind, "shipped")][..., 0]
        case "ensemble mean":
            return ensemble.mean(dim=-1)
        case "ensemble WCO":
            return ensemble.amin(dim=-1)
        case "UWO":
            return ensemble.mean(dim=-1) - c * ensemble.var(dim=-1, correction=0)
        case "posterior LCB":
            return tuned - c * scored.posterior
    if arm.distant:
        assert distance is not None
        if arm.kind == "trust hinge":
            return tuned - c * scored.unit["tuned"] * (distance - 1).clamp_min(0)
        square = distance.square()
        if arm.kind == "trust quad":
            return tuned - c * scored.unit["tuned"] * square
        return _brme(brme, scored.brme_std, "tradeoff:0.4") - c * scored.unit["brme"] * square
    return _brme(brme, scored.brme_std, {"worst": "min"}.get(arm.kind.removeprefix("BRME "), arm.kind[5:]))


def unit_of(arm: Arm, unit: Mapping[str, float]) -> float:
    """The sd within a prompt of the head that an arm is based on."""
    of = {"single, shipped before": "shipped", "PET": "pet", "BSR": "bsr", "UWO": "ensemble"}
    if "BRME" in arm.kind or "tradeoff" in arm.kind:
        return unit["brme"]
    return unit[of.get(arm.kind, "ensemble" if arm.kind.startswith("ensemble") else "tuned")]


def _brme(mean: Tensor, std: Tensor, spec: str) -> Tensor:
    means, stds = mean.flatten(0, 1), std.flatten(0, 1)
    return aggregate(means, stds, means, Aggregation.parse(spec)).view(mean.shape[:2])
