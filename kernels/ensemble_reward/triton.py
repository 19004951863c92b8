"""Launch `ensemble_reward` on CUDA and ROCm: the kernels of triton_forward.py and triton_backward.py.

Forward: one launch, and a second one to centre more than MAX_LABELLED_ROWS rows by label. Backward: three launches, for
the product's gradient from the forward's saved values, for both outer products from one read of hidden, and for the sum
of the weight's partials; with `rows`, a fourth combines repeated rows. configs.py has the tiles. CPU tensors work only
under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), which the tests use.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..arrivals import arrivals
from ..launch import Config, launch
from . import configs, reference
from .contract import Grads, Inputs, Needs, OutputGrads, Outputs
from .reference import cvar_tail
from .triton_backward import combine_kernel, outer_kernel, product_gradient_kernel, weight_gradient_kernel
from .triton_forward import centre_kernel, forward_kernel


def _common(inputs: Inputs) -> dict[str, Any]:
    """The arguments that several kernels take; each launcher selects those of its kernel."""
    spec, num_heads, hidden = inputs.spec, inputs.num_heads, inputs.hidden
    target = configs.platform(hidden.device)
    head_or_count = spec.nominal_head
    if spec.kind == "head":
        head_or_count = int(spec.coefficient)
    elif spec.kind == "cvar":
        head_or_count = cvar_tail(spec.coefficient, num_heads)
    halves = hidden.dtype == torch.bfloat16 and target.bf16_halves
    return {
        "hidden": hidden,
        "row_stride": hidden.stride(0),
        **{
            name: None if value is None else value.contiguous()
            for name in ("weight", "bias", "rows", "norm_weight", "seed", "shift", "scale", "std_ref")
            for value in (getattr(inputs, name),)
        },
        "num_rows": inputs.num_rows,
        "d": hidden.shape[1],
        "head_or_count": head_or_count,
        "coefficient": float(spec.coefficient),
        "norm_eps": float(inputs.norm_eps),
        "std_floor": float(inputs.std_floor),
        "K": num_heads,
        "KIND": spec.kind,
        "NOMINAL": spec.nominal.partition(":")[0],
        "FROM_SAMPLE": inputs.seed is not None and spec.source == "sample",
        "BN": configs.padded_columns(num_heads),
        "ACC": tl.float64 if hidden.dtype == torch.float64 else tl.float32,
        "HALVES": halves,
        "EXACT": halves and inputs.weight.dtype == torch.bfloat16 and inputs.norm_weight is None,
        # for fp32 operands: exact products with fp32 and fp64 hidden, three tf32 products with 16-bit hidden
        "PRECISION": target.fp32_dot if hidden.element_size() == 2 else "ieee",
        "UPCAST": triton.knobs.runtime.interpret,
    }


_HEADS_ARGUMENTS = (
    "bias", "seed", "shift", "scale", "std_ref", "num_rows", "d", "head_or_count", "coefficient", "std_floor", "K",
    "KIND", "NOMINAL", "FROM_SAMPLE", "BN", "ACC",
)  # fmt: skip
_PRODUCT_ARGUMENTS = (
    "hidden", "row_stride", "weight", "rows", "norm_weight", "norm_eps", "HALVES", "EXACT", "PRECISION", "UPCAST",
)  # fmt: skip
_OUTER_ARGUMENTS = (
    "hidden", "row_stride", "weight", "rows", "norm_weight", "num_rows", "d", "K", "BN", "ACC", "HALVES", "PRECISION",
    "UPCAST",
)  # fmt: skip


def forward(inputs: Inputs, keep: bool = False) -> Outputs:
    """(reward, mean, std, reward_sum, distance, saved) in one launch; saved [N, 2K + 1] if `keep`."""
    if inputs.num_heads > configs.MAX_HEADS:
        return reference.forward(inputs, keep)
    n, k, new, dtype = inputs.num_rows, inputs.num_heads, inputs.hidden.new_empty, inputs.output_dtype
    saved = new(n if keep else 0, 2 * k + 1, dtype=dtype)
    reward, mean, std = new(n, dtype=dtype), new(n, k, dtype=dtype), new(n, k, dtype=dtype)
    if n == 0:
        return reward, mean, std, inputs.hidden.new_zeros((), dtype=dtype), None, saved
    outputs = reward, mean, std, new((), dtype=dtype), None, saved
    common, target = _common(inputs), configs.platform(inputs.hidden.device).name
    config = tuning.choose(
        configs.forward_config(n, common["BN"], inputs.hidden.dtype, target),
        configs.forward_candidates(common["BN"], inputs.hidden.dtype, target),
        ("ensemble_reward.forward", *configs.bucket(n, common["BN"], common["d"], inputs.hidden.dtype)),
        lambda config: _launch_forward(inputs, common, outputs, config),
        inputs.hidden.device,
    )
    _launch_forward(inputs, common, outputs, config)
    if _centring(inputs, config)["CENTRE"] == "later":
        _centre_by_label(reward, reward, inputs)
    return outputs


def _launch_forward(inputs: Inputs, common: dict[str, Any], outputs: Outputs, config: Config) -> None:
    reward, mean, std, reward_sum, _, saved = outputs
    n, d, device, dtype = inputs.num_rows, common["d"], inputs.hidden.device, reward.dtype
    programs = triton.cdiv(n, config.block_rows)
    splits, blocks_each = configs.splits(programs, d, config, device)
    centring = _centring(inputs, config)
    new = inputs.hidden.new_empty
    shares = new(splits * programs * config.block_rows * (common["BN"] + 1), dtype=dtype) if splits > 1 else None
    table = new(centring["SWEEP"], dtype=dtype) if centring["CENTRE"] == "label" else None
    launch(
        forward_kernel, (programs, splits) if splits > 1 else (programs,), config, device,
        **{name: common[name] for name in (*_HEADS_ARGUMENTS, *_PRODUCT_ARGUMENTS)}, **centring,
        reward=reward, mean_out=mean, std_out=std, reward_sum=reward_sum, saved=saved if saved.shape[0] else None,
        partials=new(programs, dtype=dtype), shares=shares, table=table,
        counters=arrivals(device, 1 + configs.MAX_SPLIT_BLOCKS), blocks_each=blocks_each, SPLITS=splits,
        M=config.block_rows, BD=config.block_dim,
    )  # fmt: skip


def _centring(inputs: Inputs, config: Config) -> dict[str, Any]:
    """Choose where to centre: in each row block, in the last program, or (many labelled rows) in a later launch."""
    n, size, centre, labels = inputs.num_rows, inputs.group_size, inputs.spec.centre, None
    span, sweep = 1, configs.sweep(n)
    if centre == "group" and inputs.group is not None:
        centre = "label" if n <= configs.MAX_LABELLED_ROWS else "later"
        labels, sweep = inputs.group.contiguous() if centre == "label" else None, max(128, triton.next_power_of_2(n))
    elif centre == "group" and config.block_rows % size == 0:
        centre, span = "block", size
    elif centre == "group":
        centre, span = "size", min(sweep, triton.next_power_of_2(size))
    return {"CENTRE": centre, "SPAN": span, "SWEEP": sweep, "labels": labels, "size": size}


def _centre_by_label(values: Tensor, out: Tensor, inputs: Inputs) -> None:
    """out [N] = values [N] minus the mean of their label."""
    assert inputs.group is not None
    labels, order = torch.sort(inputs.group, stable=True)
    launch(
        centre_kernel, (values.shape[0],), configs.CENTRE, values.device,
        values=values, value_stride=values.stride(0), out=out, labels=labels, order=order, num_rows=values.shape[0],
        SWEEP=configs.CENTRE.block_dim, ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


def backward(grads: OutputGrads, inputs: Inputs, saved: Tensor, needs: Needs) -> Grads:
    """Gradients of hidden, weight, bias and norm_weight from the forward's saved values; None if not needed.

    hidden is read once, or not at all if only the bias needs a gradient or, without a norm, only hidden.
    """
    if inputs.num_heads > configs.MAX_HEADS:
        return reference.backward(grads, inputs, saved, needs)
    need_hidden, need_weight, _, need_norm = needs
    if inputs.num_rows == 0:
        targets = (getattr(inputs, name) for name in Needs._fields)
        return tuple(  # type: ignore[return-value]
            t.new_zeros(t.shape) if need and t is not None else None for t, need in zip(targets, needs, strict=True)
        )
    common = _common(inputs)
    scaled, along, bias = _product_gradient(grads, inputs, common, saved, needs)
    grad_bias = None
    if bias is not None:
        assert inputs.bias is not None
        grad_bias = bias.sum(dim=0).to(inputs.bias.dtype)
    hidden = weight = norm = None
    if scaled is not None:
        hidden, partials = _outer_products(scaled, along, inputs, common, need_hidden, need_weight or need_norm)
        if partials is not None:
            weight, norm = _weight_gradient(partials, inputs, common, need_weight, need_norm)
    return hidden, weight, grad_bias, norm


def _product_gradient(
    grads: OutputGrads, inputs: Inputs, common: dict[str, Any], saved: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """scaled [N, padded 2K], along [N] (hidden's gradient through a norm), bias partials [programs, 2K]."""
    n, dtype, new = inputs.num_rows, inputs.output_dtype, inputs.hidden.new_empty
    need_hidden, need_weight, need_bias, need_norm = needs
    config = configs.gradient_config(common["BN"])
    programs = triton.cdiv(n, config.block_rows)
    d_reward, d_mean, d_std, d_sum, _ = grads
    d_reward, averages, size = _centred(d_reward, inputs)
    scaled = new(n, common["BN"], dtype=dtype) if need_hidden or need_weight or need_norm else None
    along = new(n, dtype=dtype) if need_hidden and inputs.norm_weight is not None else None
    bias = new(programs, 2 * inputs.num_heads, dtype=dtype) if need_bias else None
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
        **{name: common[name] for name in _HEADS_ARGUMENTS}, **strides, saved=saved, grad_reward=d_reward,
        averages=averages, grad_mean=d_mean, grad_std=d_std, grad_sum=d_sum, scaled=scaled, along=along,
        bias_partials=bias, size=size, M=config.block_rows,
    )  # fmt: skip
    return scaled, along, bias


def _centred(d_reward: Tensor | None, inputs: Inputs) -> tuple[Tensor | None, Tensor | None, int]:
    """The reward's gradient, its average over each `size` rows, which the kernel subtracts, and `size`.

    With labels the gradient is centred already, and there are no averages.
    """
    n, dtype = inputs.num_rows, inputs.output_dtype
    if d_reward is None or inputs.spec.centre == "none":
        return d_reward, None, 1
    if inputs.group is not None:
        centred = inputs.hidden.new_empty(n, dtype=dtype)
        _centre_by_label(d_reward, centred, inputs)
        return centred, None, 1
    size = inputs.group_size if inputs.spec.centre == "group" else n
    return d_reward, d_reward.to(dtype).reshape(-1, size).mean(dim=1), size


def _outer_products(
    scaled: Tensor, along: Tensor | None, inputs: Inputs, common: dict[str, Any], need_hidden: bool, need_folded: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of hidden, and the folded weight's gradient as [shares, 2K, D] partials."""
    n, d, k = inputs.num_rows, common["d"], inputs.num_heads
    arguments = {name: common[name] for name in _OUTER_ARGUMENTS}
    out = None
    if need_hidden and inputs.rows is None:
        out = inputs.hidden.new_empty(n, d)
    elif need_hidden:
        out = inputs.hidden.new_zeros(inputs.hidden.shape)
        scaled, along, arguments["rows"] = _combined(scaled, along, common)

    def run(config: Config) -> Tensor | None:
        blocks_each, shares = configs.row_shares(n, d, config, inputs.hidden.device)
        partials = scaled.new_empty(shares, 2 * k, d) if need_folded else None
        launch(
            outer_kernel, (triton.cdiv(d, config.block_dim), shares), config, inputs.hidden.device,
            **arguments, scaled=scaled, along=along, grad_hidden=out, weight_partials=partials,
            blocks_each=blocks_each, M=config.block_rows, BD=config.block_dim,
        )  # fmt: skip
        return partials

    config = tuning.choose(
        configs.outer_config(common["BN"], inputs.hidden.dtype),
        configs.outer_candidates(common["BN"], inputs.hidden.dtype),
        ("ensemble_reward.outer", need_hidden, need_folded,
         *configs.bucket(n, common["BN"], d, inputs.hidden.dtype)),
        run, inputs.hidden.device,
    )  # fmt: skip
    return out, run(config)


def _combined(scaled: Tensor, along: Tensor | None, common: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Add up `scaled` and `along` over the positions that score the same row.

    Returns the sums in the order of the sorted rows, and the sorted rows with -1 at repeats.
    """
    config = configs.gradient_config(common["BN"])
    sorted_rows, order = torch.sort(common["rows"], stable=True)
    out = torch.empty_like(scaled), None if along is None else torch.empty_like(along), torch.empty_like(sorted_rows)
    launch(
        combine_kernel, (triton.cdiv(common["num_rows"], config.block_rows),), config, scaled.device,
        scaled=scaled, along=along, sorted_rows=sorted_rows, order=order, scaled_out=out[0], along_out=out[1],
        targets=out[2], num_rows=common["num_rows"], M=config.block_rows, BN=common["BN"], ACC=common["ACC"],
    )  # fmt: skip
    return out


def _weight_gradient(
    partials: Tensor, inputs: Inputs, common: dict[str, Any], need_weight: bool, need_norm: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Add the partials in ascending order, and separate the gradients of the head's and the norm's weight."""
    weight = torch.empty_like(common["weight"]) if need_weight else None
    norm = torch.empty_like(common["norm_weight"]) if need_norm and inputs.norm_weight is not None else None
    config = configs.weight_config(common["BN"])
    names = ("weight", "norm_weight", "d", "K", "BN", "ACC")
    launch(
        weight_gradient_kernel, (triton.cdiv(common["d"], config.block_dim),), config, partials.device,
        **{name: common[name] for name in names}, weight_partials=partials, grad_weight=weight, grad_norm_weight=norm,
        shares=partials.shape[0], BD=config.block_dim,
    )  # fmt: skip
    return weight, norm
