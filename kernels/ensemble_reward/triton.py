"""`ensemble_reward` on CUDA and ROCm: how the kernels of triton_forward.py and triton_backward.py are launched.

Forward: one launch (two with group centring). Backward: the product's gradient, both outer products, the sum of the
weight's partials; one more where `rows` gathers. Configurations come from a static table, never from timing, so that
equal calls have equal bits. CPU tensors run where Triton's interpreter is on (TRITON_INTERPRET=1 before triton is
imported): that is how the tests reach this code without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import reference
from .configs import MAX_HEADS, SMALL, SWEEP, outer_config, padded_columns, platform, product_config
from .contract import Grads, Inputs, Outputs
from .reference import cvar_tail
from .triton_backward import outer_kernel, product_gradient_kernel, scatter_kernel, weight_gradient_kernel
from .triton_forward import centre_kernel, forward_kernel

_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """[1] int32 zero that the forward's programs count their arrivals in; the kernel leaves it zero.

    One per (device, stream): kernels of a stream run one after another. A captured graph gets its own, zeroed by each
    replay, since it may be replayed beside its stream's eager calls.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


def _common(inputs: Inputs) -> dict[str, Any]:
    """The arguments that the forward and the product's gradient share."""
    spec, num_heads, itemsize = inputs.spec, inputs.num_heads, inputs.hidden.element_size()
    columns = padded_columns(num_heads)
    config = product_config(inputs.num_rows, columns, inputs.hidden.dtype)
    target = platform(inputs.hidden.device)
    pick = spec.nominal_head
    if spec.kind in ("head", "cvar"):
        pick = int(spec.coefficient) if spec.kind == "head" else cvar_tail(spec.coefficient, num_heads)
    bf16 = inputs.hidden.dtype == torch.bfloat16
    return {
        "hidden": inputs.hidden,
        "row_stride": inputs.hidden.stride(0),
        **{
            name: None if value is None else value.contiguous()
            for name in ("weight", "bias", "rows", "norm_weight", "seed", "shift", "scale", "std_ref")
            for value in (getattr(inputs, name),)
        },
        "num_rows": inputs.num_rows,
        "d": inputs.hidden.shape[1],
        "pick": pick,
        "coefficient": float(spec.coefficient),
        "norm_eps": float(inputs.norm_eps),
        "std_floor": float(inputs.std_floor),
        "K": num_heads,
        "KIND": spec.kind,
        "NOMINAL": spec.nominal.partition(":")[0],
        "FROM_SAMPLE": inputs.seed is not None and spec.source == "sample",
        "M": config.block_rows,
        "BD": config.block_dim,
        "BN": columns,
        "ACC": tl.float64 if itemsize == 8 else tl.float32,
        "HALVES": bf16 and target.bf16_halves,
        "PRECISION": _precision(inputs),
        "UPCAST": triton.knobs.runtime.interpret,
    }


def _precision(inputs: Inputs) -> str:
    """How fp32 operands are multiplied: exactly for fp32 or fp64 hidden, in three tf32 products for 16-bit."""
    return platform(inputs.hidden.device).fp32_dot if inputs.hidden.element_size() == 2 else "ieee"


def forward(inputs: Inputs, keep: bool = False) -> Outputs:
    """(reward [N], mean [N, K], std [N, K], reward_sum [], saved) in one launch; centring by group takes one more."""
    if inputs.num_heads > MAX_HEADS:
        return reference.forward(inputs, keep)
    n, k, new, dtype = inputs.num_rows, inputs.num_heads, inputs.hidden.new_empty, inputs.output_dtype
    saved = inputs.hidden.new_zeros(n if keep else 0, 2 * k + 1, dtype=dtype)
    reward, mean, std = new(n, dtype=dtype), new(n, k, dtype=dtype), new(n, k, dtype=dtype)
    if n == 0:
        return reward, mean, std, inputs.hidden.new_zeros((), dtype=dtype), saved
    reward_sum = new((), dtype=dtype)
    columns = padded_columns(k)
    config = product_config(n, columns, inputs.hidden.dtype)
    programs = triton.cdiv(n, config.block_rows)
    launch(
        forward_kernel, (programs,), config, inputs.hidden.device,
        **_common(inputs), reward=reward, mean_out=mean, std_out=std, reward_sum=reward_sum,
        partials=new(programs, dtype=dtype), counter=_counter(inputs.hidden.device),
        CENTRE=inputs.spec.centre == "batch", SWEEP=SWEEP,
    )  # fmt: skip
    if inputs.spec.centre == "group":
        _centre(reward, reward, inputs)
    return reward, mean, std, reward_sum, saved


def _centre(values: Tensor, out: Tensor, inputs: Inputs) -> None:
    """out [N] = values [N] minus the mean of their batch or group."""
    n, size, labels, order = values.shape[0], inputs.group_size, None, None
    if inputs.spec.centre == "batch":
        size = n
    if inputs.group is not None:
        labels, order = torch.sort(inputs.group, stable=True)
    launch(
        centre_kernel, (n if labels is not None else n // size,), SMALL, values.device,
        values=values, value_stride=values.stride(0), out=out, labels=labels, order=order, num_rows=n, size=size,
        SWEEP=SWEEP, ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


def backward(grads: Grads, inputs: Inputs, saved: Tensor, needs: tuple[bool, bool, bool, bool]) -> Grads:
    """Gradients of hidden, weight, bias and norm_weight, recomputing the forward; None where not needed."""
    if inputs.num_heads > MAX_HEADS:
        return reference.backward(grads, inputs, saved, needs)
    need_hidden, need_weight, need_bias, need_norm = needs
    if inputs.num_rows == 0:
        targets = (inputs.hidden, inputs.weight, inputs.bias, inputs.norm_weight)
        return tuple(  # type: ignore[return-value]
            t.new_zeros(t.shape) if need and t is not None else None for t, need in zip(targets, needs, strict=True)
        )
    scaled, along, bias = _product_gradient(grads, inputs, need_hidden, need_bias)
    grad_bias = None
    if bias is not None:
        assert inputs.bias is not None
        grad_bias = bias.sum(dim=0).to(inputs.bias.dtype)
    hidden = weight = norm = None
    if need_hidden or need_weight or need_norm:
        hidden, partials = _outer_products(scaled, along, inputs, need_hidden, need_weight or need_norm)
        if partials is not None:
            weight, norm = _weight_gradient(partials, inputs, need_weight, need_norm)
    return hidden, weight, grad_bias, norm


def _product_gradient(
    grads: Grads, inputs: Inputs, need_hidden: bool, need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """scaled [N, padded 2K], along [N] (hidden's gradient through a norm), bias partials [programs, 2K]."""
    n, k, dtype, new = inputs.num_rows, inputs.num_heads, inputs.output_dtype, inputs.hidden.new_empty
    columns = padded_columns(k)
    config = product_config(n, columns, inputs.hidden.dtype)
    programs = triton.cdiv(n, config.block_rows)
    d_reward, d_mean, d_std, d_sum = grads
    if d_reward is not None and inputs.spec.centre != "none":
        centred = new(n, dtype=dtype)
        _centre(d_reward, centred, inputs)
        d_reward = centred
    scaled = new(n, columns, dtype=dtype)
    along = new(n, dtype=dtype) if need_hidden and inputs.norm_weight is not None else None
    bias = new(programs, 2 * k, dtype=dtype) if need_bias else None
    strides = {
        name: 0 if tensor is None else tensor.stride(axis)
        for name, tensor, axis in (
            ("reward_stride", d_reward, 0),
            ("mean_row", d_mean, 0),
            ("mean_column", d_mean, 1),
            ("std_row", d_std, 0),
            ("std_column", d_std, 1),
        )
    }
    launch(
        product_gradient_kernel, (programs,), config, inputs.hidden.device,
        **_common(inputs), **strides, grad_reward=d_reward, grad_mean=d_mean, grad_std=d_std, grad_sum=d_sum,
        scaled=scaled, along=along, bias_partials=bias,
    )  # fmt: skip
    return scaled, along, bias


def _outer_products(
    scaled: Tensor, along: Tensor | None, inputs: Inputs, need_hidden: bool, need_folded: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of hidden, and the folded weight's gradient as [shares, 2K, D] partials."""
    n, d, k = inputs.num_rows, inputs.hidden.shape[1], inputs.num_heads
    dtype, new = inputs.output_dtype, inputs.hidden.new_empty
    columns = padded_columns(k)
    config = outer_config(columns, inputs.hidden.dtype)
    blocks = triton.cdiv(n, config.block_rows)
    blocks_each = triton.cdiv(blocks, 16)  # at most 16 shares of the rows: 16 partials a weight
    shares = triton.cdiv(blocks, blocks_each)
    out = None
    if need_hidden:
        out = new(n, d, dtype=inputs.hidden.dtype if inputs.rows is None else dtype)
    partials = new(shares, 2 * k, d, dtype=dtype) if need_folded else None
    common = _common(inputs)
    names = ("hidden", "row_stride", "weight", "rows", "norm_weight", "num_rows", "d", "K", "BN", "ACC", "PRECISION")
    launch(
        outer_kernel, (triton.cdiv(d, config.block_dim), shares), config, inputs.hidden.device,
        **{name: common[name] for name in names}, scaled=scaled, along=along, grad_hidden=out, weight_partials=partials,
        blocks_each=blocks_each, M=config.block_rows, BD=config.block_dim,
    )  # fmt: skip
    if out is None or inputs.rows is None:
        return out, partials
    return _scatter(out, inputs), partials


def _scatter(compact: Tensor, inputs: Inputs) -> Tensor:
    """[N, D] gradients of the gathered rows -> [R, D]; a row scored twice gets the sum, unscored rows zero."""
    assert inputs.rows is not None
    n, d = compact.shape
    block = min(SMALL.block_dim, triton.next_power_of_2(d))
    sorted_rows, order = torch.sort(inputs.rows, stable=True)
    out = inputs.hidden.new_zeros(inputs.hidden.shape)
    launch(
        scatter_kernel, (n, triton.cdiv(d, block)), SMALL, compact.device,
        compact=compact, sorted_rows=sorted_rows, order=order, grad_hidden=out, num_rows=n, d=d,
        BD=block, ACC=tl.float64 if compact.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return out


def _weight_gradient(
    partials: Tensor, inputs: Inputs, need_weight: bool, need_norm: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sums the partials in ascending order, and unfolds the norm's weight from the head's."""
    common = _common(inputs)
    d, columns = common["d"], common["BN"]
    weight = torch.empty_like(common["weight"]) if need_weight else None
    norm = torch.empty_like(common["norm_weight"]) if need_norm and inputs.norm_weight is not None else None
    config = outer_config(columns, inputs.hidden.dtype)
    names = ("weight", "norm_weight", "d", "K", "BN", "ACC")
    launch(
        weight_gradient_kernel, (triton.cdiv(d, config.block_dim),), config, partials.device,
        **{name: common[name] for name in names}, weight_partials=partials, grad_weight=weight, grad_norm_weight=norm,
        shares=partials.shape[0], BD=config.block_dim,
    )  # fmt: skip
    return weight, norm
