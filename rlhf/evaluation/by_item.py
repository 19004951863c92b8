"""Scores as one dict an item, which files and servers write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ...engine import Scores

ITEM_FIELDS = ("reward", "nominal", "worst", "mean", "std", "distance")


def by_item(scores: Scores) -> Iterator[dict[str, Any]]:
    """Yield the items' scores, in order: `ITEM_FIELDS`, without the distance if the model does not measure it.

    mean and std are lists of K. A number has nine significant digits, which tell any two fp32 numbers apart; None if it
    is not finite.
    """
    distance = [] if scores.distance is None else [scores.distance.tolist()]
    columns = (scores.reward, scores.nominal, scores.worst, scores.mean.tolist(), scores.std.tolist(), *distance)
    for values in zip(*columns, strict=True):
        yield {
            name: [_number(x) for x in value] if isinstance(value, list) else _number(value)
            for name, value in zip(ITEM_FIELDS, values, strict=False)
        }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.9g}")
