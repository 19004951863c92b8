"""Finish the rewards of an exported classifier, which ends at its 2K logits. Needs numpy alone.

logits[:, :K] are the heads' means without their constant; logits[:, K:] their raw stds, before softplus.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np


def finish(folder: str | Path, logits: Any, features: Any = None, aggregation: str | None = None) -> dict[str, Any]:
    """logits [B, 2K] -> {"reward": [B], "mean": [B, K], "std": [B, K], "distance": [B] or None}, fp64.

    folder: the classifier's, with prudent_head.json.
    logits: an array, or a tensor on the CPU that needs no gradient.
    features: [B, D], the last hidden state that the logits were computed from (outputs.hidden_states[-1] at the last
        token). The distance is quadratic in them, so logits alone do not give it.
    aggregation: another than the model's own, such as "lcb:1" or "min".
    """
    head = json.loads((Path(folder) / "prudent_head.json").read_text(encoding="utf-8"))
    k = head["num_heads"]
    z = np.asarray(logits, dtype=np.float64) + np.array(head["offset"])
    mean, std = z[:, :k], (np.logaddexp(0.0, z[:, k:]) + head["std_floor"]) / np.array(head["scale"])
    distance = None
    if features is not None and head["unit"] is not None:
        distance = _distance(np.load(Path(folder) / "prudent_trust.npz"), np.asarray(features, dtype=np.float64))
    kind, number, options = _parsed(aggregation or head["aggregation"])
    nominal = _nominal(options.get("nominal", "least_std"), mean, std, np.array(head["std_ref"]))
    reward, price = _combined(kind, number, mean, nominal), float(options.get("trust", 0))
    if price:
        if distance is None:
            raise ValueError("features: expected the last hidden states [B, D], because the reward prices the distance")
        beyond = np.maximum(distance - float(options.get("from", 0)), 0) ** int(options.get("power", 2))
        reward = reward - price * head["unit"] * beyond
    return {"reward": reward, "mean": mean, "std": std, "distance": distance}


def _parsed(aggregation: str) -> tuple[str, float, dict[str, str]]:
    """`kind:number,name=value,...`, as prudent writes it."""
    kind, *rest = aggregation.split(",")
    kind, _, number = kind.partition(":")
    options = dict(option.split("=") for option in rest)
    if kind == "trust":
        kind, options["trust"] = "mean", number
    if kind == "batch_worst" or {"centre", "worst"} & {*options}:
        raise ValueError(f"aggregation: expected one that scores each row by itself, got {aggregation!r}")
    return kind, float(number or 0), options


def _combined(kind: str, c: float, mean: Any, nominal: Any) -> Any:
    """The means [B, K] and their nominal one [B] -> [B]; kernels/ensemble_reward/spec.py of prudent has the table."""
    ranked, k = np.sort(mean, axis=1), mean.shape[1]
    if kind in ("tradeoff", "nominal"):
        return nominal if kind == "nominal" else c * nominal + (1 - c) * ranked[:, 0]
    if kind == "softmin":
        return ranked[:, 0] - c * np.log(np.exp((ranked[:, :1] - mean) / c).mean(axis=1))
    if kind == "cvar":
        return ranked[:, : max(1, math.ceil(c * k - 1e-9))].mean(axis=1)
    if kind == "head":
        return mean[:, int(c)]
    if kind in ("lcb", "uwo"):
        return mean.mean(axis=1) - c * (mean.std(axis=1) if kind == "lcb" else mean.var(axis=1))
    combine: Any = {"mean": np.mean, "min": np.min, "max": np.max, "median": np.median}[kind]
    return combine(mean, axis=1)


def _nominal(which: str, mean: Any, std: Any, std_ref: Any) -> Any:
    """[B]: the mean of the head that is surest."""
    if which == "mean":
        return mean.mean(axis=1)
    if which.startswith("head:"):
        return mean[:, int(which[5:])]
    surest = (std / std_ref if which == "relative_std" else std).argmin(axis=1)
    return mean[np.arange(len(mean)), surest]


def _distance(region: Any, features: Any) -> Any:
    gap = features - region["mean"]
    along = gap @ region["directions"].T
    return np.sqrt(np.maximum(gap**2 @ region["precision"] + along**2 @ region["weights"], 0))
