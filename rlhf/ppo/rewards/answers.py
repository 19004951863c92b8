"""Check the answer of a reward function or server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .sources import Rewards


def rewards_of(answer: Any, count: int, where: str) -> Rewards:
    """Return the rewards of `count` samples in an answer. ValueError, beginning with `where`, for another form."""
    parts = dict(answer) if isinstance(answer, Mapping) else {"rewards": answer}
    if "rewards" not in parts:
        raise ValueError(f"{where}: expected rewards in the answer, got {', '.join(map(str, parts)) or 'an empty one'}")
    if parts["rewards"] is None:
        raise ValueError(f"{where}: expected rewards, got None")
    tensors = {
        name: _numbers(parts[name], count, f"{where}: {name}", matrix=name in ("mean", "std"))
        for name in ("rewards", "nominal", "worst", "mean", "std", "distance")
        if parts.get(name) is not None
    }
    mean, std = tensors.get("mean"), tensors.get("std")
    if mean is not None and std is not None and mean.shape != std.shape:
        raise ValueError(
            f"{where}: expected mean and std of the same heads, got {mean.shape[1]} and {std.shape[1]} per response"
        )
    reward = tensors.pop("rewards")
    return Rewards(torch.where(reward.isfinite(), reward, float("nan")), **tensors)


def _numbers(values: Any, count: int, where: str, matrix: bool) -> Tensor:
    """[N] or [N, K] fp32; None becomes NaN."""
    rows = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows) != count:
        got = f"{len(rows)}" if isinstance(rows, Sequence) and not isinstance(rows, str) else type(rows).__name__
        raise ValueError(f"{where}: expected a list of {count}, one per response, got {got}")
    if not matrix:
        return torch.tensor([_number(value, where) for value in rows], dtype=torch.float32)
    if not all(isinstance(row, Sequence) and len(row) == len(rows[0]) > 0 for row in rows):
        raise ValueError(f"{where}: expected one list per response, all of one length and none empty")
    return torch.tensor([[_number(value, where) for value in row] for row in rows], dtype=torch.float32)


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "tolist"):  # a tensor or array of one element in a list
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    if not isinstance(value, (int, float)):  # True counts as 1, as in TRL
        raise ValueError(f"{where}: expected numbers, None or NaN, got {value!r:.80}")
    try:
        return float(value)
    except OverflowError:  # an integer too large for a float counts as infinite
        return math.nan
