"""Launch `preference_step` on CUDA, compiled for ROCm: the kernels of triton_kernels.py.

There are two launches, and for eq. 8 a sort of the pairs by head before them. The split of the pairs among programs
depends only on shapes, so equal calls have equal bits. CPU tensors work only under Triton's interpreter, which the
tests use.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import reference
from .configs import finish_config, max_dim, shares_of, step_config
from .contract import Inputs, Outputs
from .triton_kernels import finish_kernel, step_kernel

LANES = 32 if torch.version.hip is None else 64  # threads of a warp


def step(inputs: Inputs, lanes: int = LANES) -> Outputs:
    """(loss [], dweight [2K, D], dbias [2K], accuracy [], std []); widths past `max_dim` run the reference."""
    features, d, heads, pairs = inputs.features, inputs.features.shape[1], inputs.num_heads, inputs.num_pairs
    widest = max_dim(inputs.loss, features.dtype, lanes)
    if d > widest:
        warnings.warn(
            f"preference_step: the kernel holds at most {widest} columns for loss {inputs.loss} and {features.dtype}, "
            f"got {d}: the reference runs, with a wide copy of the features",
            stacklevel=2,
        )
        return reference.step(inputs)
    brme, dtype, device = inputs.loss == "brme", inputs.output_dtype, features.device
    config = step_config(d, features.dtype, lanes)
    finish = finish_config(features.dtype)
    groups = heads if brme else 1
    shares = shares_of(pairs, groups, d)
    directions = (2 if brme else 0) + int(bool(inputs.centre) or not brme) + int(bool(inputs.bsr))
    partials = features.new_empty(groups * shares, directions, d, dtype=dtype)
    sums = features.new_empty(groups * shares, 8, dtype=dtype)
    common: dict[str, Any] = {
        "partials": partials,
        "sums": sums,
        "pairs": pairs,
        "d": d,
        "centre": inputs.centre,
        "K": heads,
        "BRME": brme,
        "CENTRE": bool(inputs.centre),
        "BSR": bool(inputs.bsr),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    vectors: dict[str, Tensor | None] = {
        name: None if value is None else value.contiguous()
        for name in ("weight", "bias", "rows", "p_hat", "margin", "seed")
        for value in (getattr(inputs, name),)
    } | {"order": None, "starts": None}
    if brme:
        vectors |= _by_head(inputs)
    launch(
        step_kernel, (shares, groups), config, device,
        **common, **vectors, features=features, row_stride=features.stride(0), reward_weight=_reward_weight(inputs),
        alpha=inputs.alpha, std_floor=inputs.std_floor,
        KP=triton.next_power_of_2(heads), MP=config.block_rows, DP=config.block_dim, STAGES=config.num_stages,
    )  # fmt: skip
    dweight, dbias = inputs.weight.new_empty(2 * heads, d), inputs.bias.new_empty(2 * heads)
    loss, accuracy, std = (features.new_empty((), dtype=dtype) for _ in range(3))
    launch(
        finish_kernel, (triton.cdiv(d, finish.block_dim), groups), finish, device,
        **common, dweight=dweight, dbias=dbias, loss=loss, accuracy=accuracy, std=std, shares=shares, bsr=inputs.bsr,
        SB=finish.block_rows, BD=finish.block_dim, STAGES=finish.num_stages,
    )  # fmt: skip
    return loss, dweight, dbias, accuracy, std


def _by_head(inputs: Inputs) -> dict[str, Tensor | None]:
    """order [P], the pairs sorted stably by head; starts [K + 1], the index of each head's first pair; rows [2P] in
    that order.
    """
    assert inputs.head_id is not None
    ids, order = torch.sort(inputs.head_id, stable=True)
    starts = torch.searchsorted(ids, torch.arange(inputs.num_heads + 1, device=ids.device))
    rows = None if inputs.rows is None else inputs.rows.reshape(2, -1).index_select(1, order)
    return {"order": order, "starts": starts, "rows": rows}


def _reward_weight(inputs: Inputs) -> Tensor | None:
    """[D]: the mean of the heads' mean rows, whose product with x is the reward; None if no reward is needed."""
    if inputs.loss == "brme" and not (inputs.bsr or inputs.centre):
        return None
    if inputs.num_heads == 1:
        return inputs.weight[0].contiguous()
    return inputs.weight[: inputs.num_heads].mean(dim=0, dtype=inputs.output_dtype)
