"""Launch `preference_step` on CUDA, compiled for ROCm: triton_kernels.py and, for wide features, triton_wide.py.

There are two launches, three for wide features, and for eq. 8 a sort of the pairs by head before them. The split of the
pairs among programs depends only on shapes, so equal calls have equal bits. CPU tensors work only under Triton's
interpreter, which the tests use.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .configs import finish_config, one_read, shares_of, step_config, wide_config
from .contract import Inputs, Outputs
from .triton_kernels import finish_kernel, step_kernel
from .triton_wide import coefficient_kernel, direction_kernel

LANES = 32 if torch.version.hip is None else 64  # threads of a warp


def step(inputs: Inputs, lanes: int = LANES) -> Outputs:
    """(loss [], dweight [2K, D], dbias [2K], accuracy [], std []); in two reads of the features past `one_read`."""
    features, d, heads, pairs = inputs.features, inputs.features.shape[1], inputs.num_heads, inputs.num_pairs
    brme, dtype, device = inputs.loss == "brme", inputs.output_dtype, features.device
    finish = finish_config(features.dtype)
    groups = heads if brme else 1
    shares = shares_of(pairs, groups, d)
    directions = (2 if brme else 0) + int(bool(inputs.centre) or not brme) + int(bool(inputs.bsr))
    partials = features.new_empty(groups * shares, directions, d, dtype=dtype)
    sums = features.new_empty(groups * shares, 8, dtype=dtype)
    options: dict[str, Any] = {
        "pairs": pairs,
        "d": d,
        "BRME": brme,
        "CENTRE": bool(inputs.centre),
        "BSR": bool(inputs.bsr),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    read = _in_one_read if d <= one_read(inputs.loss, features.dtype, lanes) else _in_two_reads
    read(inputs, lanes, (shares, groups), options, partials, sums)
    dweight, dbias = inputs.weight.new_empty(2 * heads, d), inputs.bias.new_empty(2 * heads)
    loss, accuracy, std = (features.new_empty((), dtype=dtype) for _ in range(3))
    launch(
        finish_kernel, (triton.cdiv(d, finish.block_dim), groups), finish, device,
        **options, partials=partials, sums=sums, dweight=dweight, dbias=dbias, loss=loss, accuracy=accuracy, std=std,
        shares=shares, centre=inputs.centre, bsr=inputs.bsr, K=heads,
        SB=finish.block_rows, BD=finish.block_dim, STAGES=finish.num_stages,
    )  # fmt: skip
    return loss, dweight, dbias, accuracy, std


def _in_one_read(
    inputs: Inputs, lanes: int, grid: tuple[int, int], options: dict[str, Any], partials: Tensor, sums: Tensor
) -> None:
    config = step_config(inputs.features.shape[1], inputs.features.dtype, lanes)
    launch(
        step_kernel, grid, config, inputs.features.device,
        **options, **_batch(inputs), **_losses(inputs), partials=partials, sums=sums,
        MP=config.block_rows, DP=config.block_dim, STAGES=config.num_stages,
    )  # fmt: skip


def _in_two_reads(
    inputs: Inputs, lanes: int, grid: tuple[int, int], options: dict[str, Any], partials: Tensor, sums: Tensor
) -> None:
    config, batch = wide_config(inputs.features.dtype, lanes), _batch(inputs)
    trained = (2 if options["BRME"] else 0) + int(options["CENTRE"] or not options["BRME"])
    coefficients = inputs.features.new_empty(trained, inputs.num_rows, dtype=inputs.output_dtype)
    tile: dict[str, Any] = {"MP": config.block_rows, "BD": config.block_dim, "STAGES": config.num_stages}
    launch(
        coefficient_kernel, grid, config, inputs.features.device,
        **options, **batch, **_losses(inputs), **tile, coefficients=coefficients, sums=sums,
    )  # fmt: skip
    launch(
        direction_kernel, (*grid, triton.cdiv(options["d"], config.block_dim)), config, inputs.features.device,
        **options, **batch, **tile, coefficients=coefficients, partials=partials,
    )  # fmt: skip


def _batch(inputs: Inputs) -> dict[str, Any]:
    """The arguments that say which features a program reads."""
    found: dict[str, Any] = {"features": inputs.features, "row_stride": inputs.features.stride(0)}
    if inputs.loss == "brme":
        return found | _by_head(inputs)
    return found | {"rows": None if inputs.rows is None else inputs.rows.contiguous(), "order": None, "starts": None}


def _losses(inputs: Inputs) -> dict[str, Any]:
    """The arguments that products and losses need."""
    vectors: dict[str, Tensor | None] = {
        name: None if value is None else value.contiguous()
        for name in ("weight", "bias", "p_hat", "margin", "seed")
        for value in (getattr(inputs, name),)
    }
    numbers = {name: getattr(inputs, name) for name in ("alpha", "centre", "std_floor")}
    heads = inputs.num_heads
    return {
        **vectors,
        **numbers,
        "reward_weight": _reward_weight(inputs),
        "K": heads,
        "KP": triton.next_power_of_2(heads),
    }


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
