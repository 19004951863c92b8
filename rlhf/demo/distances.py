"""How far each kind of text is from the reference responses, and whether the distance tells it from the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.statistics import auroc_interval
from .candidates import Candidates, Policies
from .rewards import TITLES, Fitted, Reference, distance

TRAINING, HELD_OUT = "training prompts' responses", "held-out prompts' responses"
_QUANTILES = {"low": 0.05, "lower": 0.25, "median": 0.5, "upper": 0.75, "high": 0.95}


class Measured(NamedTuple):
    """distance [n], and the number of each text's prompt [n] int64, which intervals resample."""

    distance: Tensor
    prompt: Tensor


def of_candidates(fitted: Fitted, candidates: Candidates) -> Tensor:
    """[P, N + A]."""
    return distance(fitted, candidates.features.flatten(0, 1)).view(candidates.features.shape[:2])


def of_pairs(fitted: Fitted, reference: Reference, held_out: Tensor, prompts: Tensor) -> dict[str, Measured]:
    """Of the reference responses, and of held-out ones [N, D] with their prompts' labels [N]."""
    return {
        TRAINING: Measured(distance(fitted, reference.features), reference.prompts),
        HELD_OUT: Measured(distance(fitted, held_out), prompts),
    }


def measure(
    fitted: Fitted, reference: Reference, candidates: Candidates, policies: Policies | None
) -> dict[str, Measured]:
    """Of the reference responses, of every kind of candidate, and of the trained policies' responses."""
    count, prompts = candidates.features.shape[:2][1], torch.arange(len(candidates.prompts))
    far, kinds = of_candidates(fitted, candidates), candidates.kinds[0]
    found = {TRAINING: Measured(distance(fitted, reference.features), reference.prompts)}
    for kind in dict.fromkeys(kinds):
        columns = [i for i in range(count) if kinds[i] == kind]
        found[kind or HELD_OUT] = Measured(far[:, columns].flatten(), prompts.repeat_interleave(len(columns)))
    for kind, features in candidates.others.items():
        found[kind] = Measured(distance(fitted, features), prompts[: len(features)])
    for name, rollouts in ({} if policies is None else policies).items():
        values = distance(fitted, torch.cat([rollout.features for rollout in rollouts]))
        found[f"PPO on the {TITLES[name]}"] = Measured(values, prompts.repeat_interleave(len(values) // len(rollouts)))
    return found


def distance_rows(measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """A row for each kind: its number of texts, quantiles, share beyond 1, and its AUROC against `HELD_OUT`, as JSON.

    measured: by kind, `TRAINING` and `HELD_OUT` among them; empty kinds are left out.
    """
    rows = []
    for kind, found in measured.items():
        if not len(found.distance):
            continue
        values = found.distance.double()
        rows.append(
            {
                "kind": kind,
                "texts": len(values),
                **{name: float(values.quantile(share)) for name, share in _QUANTILES.items()},
                "beyond": float((values > 1).double().mean()),
                "auroc": None if kind in (TRAINING, HELD_OUT) else _auroc(measured[HELD_OUT], found),
            }
        )
    return rows


def _auroc(known: Measured, foreign: Measured) -> dict[str, float | None]:
    signal, prompts = (torch.cat(pair) for pair in zip(known, foreign, strict=True))
    positive = torch.arange(len(signal)) >= len(known.distance)
    return auroc_interval(signal, positive, prompts.unique(return_inverse=True)[1], resamples=500)._asdict()


def table_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A header, then each kind as text."""
    lines = [["text", "number", "median distance", "beyond 1, %", "AUROC", "95 % interval"]]
    for row in rows:
        found = row["auroc"]
        cells = ["", ""]
        if found is not None and found["value"] is not None:
            cells = [
                f"{found['value']:.2f}",
                f"{found['low']:.2f} to {found['high']:.2f}" if found["low"] is not None else "",
            ]
        lines.append([row["kind"], str(row["texts"]), f"{row['median']:.2f}", f"{100 * row['beyond']:.0f}", *cells])
    return lines
