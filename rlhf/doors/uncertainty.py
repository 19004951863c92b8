"""What a trainer's log says of a batch of rewards beside their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .wire import uncertainty

COLUMNS = ("std", "gap", "distance")


def columns_of(scored: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """std, gap and distance (as in `wire.uncertainty`), each with one number a response, None if it is not finite.

    A column that no response has is left out: the distance of a model without a trust region, the gap from a server
    that answers vectors.
    """
    rows = [uncertainty({"nominal": None, "worst": None, **result}) for result in scored]
    has_gap = any("nominal" in result for result in scored)
    names = [name for name in COLUMNS if any(name in row for row in rows) and (name != "gap" or has_gap)]
    return {name: [row.get(name) for row in rows] for name in names}


def metrics_of(scored: Sequence[Mapping[str, Any]], complete: Sequence[bool]) -> dict[str, float]:
    """The batch's scalars; the same names in every batch of one model, so that all ranks log alike.

    std        mean over responses of the heads' mean std
    gap        mean of nominal - worst: what pessimism costs
    distance   mean distance from the reference responses, 1 = their 95 % quantile
    foreign    share of responses farther than 1
    truncated  share of responses that were cut off
    missing    share of responses without a reward
    shortened  share that the reward model read without their beginning, because they are too long for it

    Means are over the responses that have the number; NaN if none has.
    """
    columns = columns_of(scored)
    found = {name: _mean(column) for name, column in columns.items()}
    if "distance" in columns:
        found["foreign"] = _mean([None if d is None else float(d > 1) for d in columns["distance"]])
    found["truncated"] = _mean([float(not whole) for whole in complete])
    found["missing"] = _mean([float(result["reward"] is None) for result in scored])
    if any("truncated" in result for result in scored):
        found["shortened"] = _mean([float(result.get("truncated", False)) for result in scored])
    return found


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan
