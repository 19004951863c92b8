"""Aggregations that are linear in the heads' means, which one ordinary linear layer can carry."""

from __future__ import annotations

from ...kernels import Aggregation


def linear_weights(spec: Aggregation, num_heads: int) -> list[float] | None:
    """a [K] with reward = sum_k a_k mean_k; None if the aggregation is not linear or reads more than the means.

    Of one head every aggregation is its mean. Centring is no matter of one row, and so is not looked at.
    """
    if spec.trust or spec.of_batch:
        return None
    if num_heads == 1:
        return [1.0]
    alone = spec.kind == "nominal" or (spec.kind == "tradeoff" and spec.coefficient == 1)
    if spec.kind == "head":
        chosen: int | None = int(spec.coefficient)
    elif alone and spec.nominal.startswith("head:"):
        chosen = spec.nominal_head
    elif spec.kind == "mean" or (alone and spec.nominal == "mean"):
        chosen = None
    else:
        return None
    return [1 / num_heads if chosen is None else float(head == chosen) for head in range(num_heads)]
