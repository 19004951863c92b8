"""Best-of-n against the demo's rewards: gold of the pick against n, and what the intervals say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.best_of_n import best_of_n_curve, powers_of_two
from ..evaluation.crossed import crossed_interval
from ..evaluation.statistics import Interval
from ..report.words import signed, verdict
from .candidates import MIXTURE, OWN
from .judges import CAREFUL, VADER
from .rewards import ENSEMBLE, SINGLE, TITLES, TRUST

AGAINST = (SINGLE, ENSEMBLE)  # with which the trust region is compared


class Curve(NamedTuple):
    """Gold of a reward's pick from n candidates: [S, P, M] for S draws, P prompts and M values of n."""

    n: list[int]
    gold: Tensor

    def interval(self, place: int = -1) -> Interval:
        """Mean and 95 % interval over draws and prompts at the n of `place`."""
        return crossed_interval(self.gold[..., place])

    def __sub__(self, other: Curve) -> Curve:
        return Curve(self.n, self.gold - other.gold)


def curves(proxies: Sequence[Mapping[str, Tensor]], gold: Tensor, pool: Tensor) -> dict[str, Curve]:
    """Best-of-n from a pool, for each draw's rewards and for the judge itself ("oracle").

    Args:
        proxies: of each draw, reward's name -> [P, N + A].   gold: [P, N + A].   pool: [N] numbers of the candidates.
    """
    ns, judged = powers_of_two(len(pool)), gold[:, pool]
    found = {
        name: torch.stack([best_of_n_curve(draw[name][:, pool], judged, ns).gold_per_prompt for draw in proxies])
        for name in proxies[0]
    }
    found["oracle"] = best_of_n_curve(judged, judged, ns).gold_per_prompt.expand_as(next(iter(found.values())))
    return {name: Curve(ns, values) for name, values in found.items()}


def as_dict(found: Mapping[str, Curve]) -> dict[str, Any]:
    """{"n", "scorers": name -> intervals for each n, "comparisons", "trends"}, as JSON.

    A trend is the change over the last factor 4 of n, chosen beforehand: the fall from the highest point would be
    biased, because that point is selected for being high.
    """
    ns = found[TRUST].n
    early = max((i for i, n in enumerate(ns) if 4 * n <= ns[-1]), default=0)

    def row(difference: Interval, *words: str) -> dict[str, Any]:
        return {**difference._asdict(), "verdict": verdict(difference, *words)}

    def trend(curve: Curve) -> Interval:
        return crossed_interval(curve.gold[..., -1] - curve.gold[..., early])

    return {
        "prompts": found[TRUST].gold.shape[1],
        "draws": found[TRUST].gold.shape[0],
        "n": ns,
        "scorers": {
            name: [curve.interval(place)._asdict() for place in range(len(ns))] for name, curve in found.items()
        },
        "comparisons": {against: row((found[TRUST] - found[against]).interval()) for against in AGAINST},
        "first": ns[early],
        "trends": {
            name: row(trend(curve), "rises", "falls", "no change shown")
            for name, curve in found.items()
            if name != "oracle"
        },
    }


def findings(attacks: Mapping[str, Mapping[str, Mapping[str, Any]]], foreign: float) -> list[str]:
    """Sentences that the intervals decide: the mixture, the model's own candidates, over-optimisation, the other judge.

    attacks: judge -> pool -> `as_dict`.   foreign: the mixture's share of foreign candidates.
    """
    mixed, own = attacks[CAREFUL][MIXTURE], attacks[CAREFUL][OWN]
    where = f"With {100 * foreign:.0f} % foreign text among {mixed['n'][-1]} candidates"
    lines = [
        f"{where}, {_compared(mixed)}.",
        f"Among the model's own {own['n'][-1]} responses, {_compared(own)}.",
    ]
    falling = [TITLES[name] for name, trend in mixed["trends"].items() if trend["verdict"] == "falls"]
    span = f"from n = {mixed['first']} to n = {mixed['n'][-1]} of the mixture"
    if falling:
        lines.append(f"Over-optimisation: {span}, the gold reward falls for the {' and the '.join(falling)}.")
    else:
        lines.append(f"No over-optimisation is shown: {span}, no fall of a reward's gold lies beyond its interval.")
    lines.append(f"Judged and taught by VADER, in the same mixture, {_compared(attacks[VADER][MIXTURE])}.")
    return lines


def _compared(found: Mapping[str, Any]) -> str:
    """What the trust region's pick is worth beside the others', in words with their intervals."""
    words = {"higher": "more gold reward than", "lower": "less gold reward than"}
    groups: dict[str, list[str]] = {}
    for against, row in found["comparisons"].items():
        difference = signed((row["value"], row["low"], row["high"]), 2)
        groups.setdefault(row["verdict"], []).append(f"the {TITLES[against]} ({difference})")
    parts = [f"{word} {' and '.join(groups[key])}" for key, word in words.items() if key in groups]
    said = f"the trust region picks responses with {' and '.join(parts)}" if parts else ""
    rest = groups.get("no difference shown", [])
    if rest:
        none = f"no difference {'between the trust region and' if not parts else 'from'} {' or '.join(rest)} is shown"
        said = f"{said}; {none}" if said else none
    return said
