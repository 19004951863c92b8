"""Launch `ensemble_reward` on CUDA, compiled for ROCm: the kernels of triton_forward.py and triton_backward.py.

Forward: one launch, and a second one to centre more than MAX_LABELLED_ROWS rows by label. Backward: three launches, for
the product's gradient from the forward's saved values, for both outer products from one read of hidden, and for the sum
of the weight's partials; with `rows`, a fourth combines repeated rows. A trust region or a worst head of the batch adds
no launch. configs.py has the tiles. CPU tensors work only
under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), which the tests use.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..arrivals import arrivals
from ..launch import Config, Launch, is_recording, launch
from ..replay import Replays, describe, of_launch
from . import configs, reference
from .contract import Grads, Inputs, Needs, OutputGrads, Outputs
from .reference import cvar_tail
from .triton_backward import combine_kernel, outer_kernel, product_gradient_kernel, weight_gradient_kernel
from .triton_centre import centre_kernel
from .triton_forward import forward_kernel
from .trust import TrustRegion


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
    columns, directions = configs.padded_columns(num_heads), configs.num_directions(inputs)
    region = {} if inputs.trust is None else inputs.trust._asdict()
    return {
        "hidden": hidden,
        "row_stride": hidden.stride(0),
        **{
            name: None if value is None else value.contiguous()
            for name in ("weight", "bias", "rows", "norm_weight", "seed", "shift", "scale", "std_ref")
            for value in (getattr(inputs, name),)
        },
        **{
            "centre" if name == "mean" else name: None if value is None or value.numel() == 0 else value.contiguous()
            for name in TrustRegion._fields
            for value in (region.get(name),)
        },
        "num_rows": inputs.num_rows,
        "d": hidden.shape[1],
        "head_or_count": head_or_count,
        "coefficient": float(spec.coefficient),
        "norm_eps": float(inputs.norm_eps),
        "std_floor": float(inputs.std_floor),
        "trust": float(spec.trust or 0.0),
        "trust_from": float(spec.trust_from),
        "K": num_heads,
        "R": directions,
        "S": inputs.saved_columns,
        "KIND": spec.kind,
        "NOMINAL": spec.nominal.partition(":")[0],
        "OF_BATCH": spec.of_batch,
        "POWER": 0 if spec.trust is None else spec.trust_power,
        "FROM_SAMPLE": inputs.seed is not None and spec.source == "sample",
        "BN": columns,
        "RN": configs.padded_directions(directions),
        "ACC": tl.float64 if hidden.dtype == torch.float64 else tl.float32,
        "HALVES": halves,
        "EXACT": halves and inputs.weight.dtype == torch.bfloat16 and inputs.norm_weight is None,
        # for fp32 operands: exact products with fp32 and fp64 hidden, three tf32 products with 16-bit hidden
        "PRECISION": target.fp32_dot if hidden.element_size() == 2 else "ieee",
        "UPCAST": triton.knobs.runtime.interpret,
        "STORES_DONE": target.stores_done,
    }


_HEADS_ARGUMENTS = (
    "bias", "seed", "shift", "scale", "std_ref", "weights", "unit", "num_rows", "d", "head_or_count", "coefficient",
    "std_floor", "trust", "trust_from", "K", "R", "S", "KIND", "NOMINAL", "OF_BATCH", "POWER", "FROM_SAMPLE", "BN",
    "RN", "ACC",
)  # fmt: skip
_PRODUCT_ARGUMENTS = (
    "hidden", "row_stride", "weight", "rows", "norm_weight", "norm_eps", "centre", "precision", "directions", "rms",
    "HALVES", "EXACT", "PRECISION", "UPCAST", "STORES_DONE",
)  # fmt: skip
_OUTER_ARGUMENTS = (
    "hidden", "row_stride", "weight", "rows", "norm_weight", "centre", "precision", "directions", "num_rows", "d", "K",
    "R", "BN", "RN", "ACC", "HALVES", "PRECISION", "UPCAST",
)  # fmt: skip


def forward(inputs: Inputs, keep: bool = False) -> Outputs:
    """(reward, mean, std, reward_sum, distance, saved) in one launch; saved [N, S] if `keep`."""
    if not configs.fits(inputs):
        return reference.forward(inputs, keep)
    n, k, new, dtype = inputs.num_rows, inputs.num_heads, inputs.hidden.new_empty, inputs.output_dtype
    saved = new(n if keep else 0, inputs.saved_columns, dtype=dtype)
    reward, mean, std = new(n, dtype=dtype), new(n, k, dtype=dtype), new(n, k, dtype=dtype)
    distance = None if inputs.trust is None else new(n, dtype=dtype)
    if n == 0:
        return reward, mean, std, inputs.hidden.new_zeros((), dtype=dtype), distance, saved
    outputs = reward, mean, std, new((), dtype=dtype), distance, saved
    common, target = _common(inputs), configs.platform(inputs.hidden.device).name
    columns = configs.columns_of(inputs)
    config = tuning.choose(
        configs.forward_config(n, columns, inputs.hidden.dtype, target),
        configs.forward_candidates(columns, inputs.hidden.dtype, target),
        ("ensemble_reward.forward", *configs.bucket(n, columns, common["d"], inputs.hidden.dtype)),
        lambda config: _launch_forward(inputs, common, outputs, config),
        inputs.hidden.device,
    )
    started, compiled = _launch_forward(inputs, common, outputs, config)
    if started.arguments["CENTRE"] == "later":
        _centre_by_label(reward, reward, inputs)
    else:
        _keep(started, compiled, inputs, outputs, keep)
    return outputs


_FIELDS = {"group": "labels", "trust_mean": "centre"}  # of `Inputs`, where the kernel's name is another
_TENSORS = tuple(_FIELDS.get(name, name.removeprefix("trust_")) for name in Inputs._fields[:10] + Inputs._fields[14:])
_OUTPUTS = ("reward", "mean_out", "std_out", "reward_sum", "distance", "saved")
_SCRATCH = ("partials", "head_sums", "shares", "region_shares", "table")
_replays = Replays()


def _keep(started: Launch, compiled: Any, inputs: Inputs, outputs: Outputs, keep: bool) -> None:
    """Keep the forward's launch for `again`, if it can be repeated. With autotuning it cannot: every call chooses."""
    described = None if compiled is None or tuning.enabled() else describe(inputs.tensors, (keep, *inputs.options))
    if described is None:
        return
    replay = of_launch(
        started, compiled, dict(zip(_TENSORS, inputs.tensors, strict=True)),
        dict(zip(_OUTPUTS, outputs, strict=True)), _SCRATCH,
    )  # fmt: skip
    if replay is not None:
        _replays.keep(described[0], replay)


def again(inputs: Inputs, keep: bool) -> Outputs | None:
    """`forward` for a call of a class that was launched before, whose arguments were checked then: the compiled kernel
    is started at once. None for any other call, and where each call is checked or chooses a tile.
    """
    described = describe(inputs.tensors, (keep, *inputs.options))
    if described is None or is_recording() or tuning.enabled() or os.environ.get("PRUDENT_DEBUG") == "1":
        return None
    key, addresses = described
    replay = _replays.find(key)
    return None if replay is None else tuple(replay(addresses, _counters))  # type: ignore[return-value]


def forget() -> None:
    """Forget the launches that `again` repeats."""
    _replays.clear()


def _counters(device: torch.device) -> Tensor:
    return arrivals(device, 1 + configs.MAX_SPLIT_BLOCKS)


def _launch_forward(inputs: Inputs, common: dict[str, Any], outputs: Outputs, config: Config) -> tuple[Launch, Any]:
    """The launch, and what `launch` returned."""
    reward, mean, std, reward_sum, distance, saved = outputs
    n, d, device, dtype = inputs.num_rows, common["d"], inputs.hidden.device, reward.dtype
    programs = triton.cdiv(n, config.block_rows)
    splits, blocks_each = configs.splits(programs, d, config, device)
    centring = _centring(inputs, config)
    new = inputs.hidden.new_empty
    shares = new(splits * programs * config.block_rows * (common["BN"] + 1), dtype=dtype) if splits > 1 else None
    region_shares = None
    if splits > 1 and distance is not None:
        region_shares = new(splits * programs * _share_columns(common, config.block_rows), dtype=dtype)
    head_sums = new(programs, common["BN"] // 2, dtype=torch.float64) if common["OF_BATCH"] else None
    table = new(centring["SWEEP"], dtype=dtype) if centring["CENTRE"] == "label" else None
    grid = (programs, splits) if splits > 1 else (programs,)
    arguments = dict(
        **{name: common[name] for name in (*_HEADS_ARGUMENTS, *_PRODUCT_ARGUMENTS)}, **centring,
        reward=reward, mean_out=mean, std_out=std, reward_sum=reward_sum, distance=distance,
        saved=saved if saved.shape[0] else None, partials=None if common["OF_BATCH"] else new(programs, dtype=dtype),
        head_sums=head_sums, shares=shares, region_shares=region_shares, table=table,
        counters=_counters(device), blocks_each=blocks_each, SPLITS=splits, M=config.block_rows, BD=config.block_dim,
    )  # fmt: skip
    compiled = launch(forward_kernel, grid, config, device, **arguments)
    return Launch(forward_kernel, grid, config, arguments), compiled


def _share_columns(common: dict[str, Any], block_rows: int) -> int:
    """Numbers that one part of D of one row block keeps of the trust region's sums; triton_trust.py lays them out."""
    return (block_rows + 1) * (common["RN"] if common["R"] else 0) + 2 * block_rows + 1


def _centring(inputs: Inputs, config: Config) -> dict[str, Any]:
    """Choose where to centre: in each row block, in the last program, or (many labelled rows) in a later launch."""
    n, size, centre, labels = inputs.num_rows, inputs.group_size, inputs.spec.centre, None
    span, sweep = 1, configs.sweep(n)
    if centre == "group" and inputs.group is not None:
        centre = "label" if n <= configs.MAX_LABELLED_ROWS else "later"
        labels, sweep = inputs.group.contiguous() if centre == "label" else None, max(128, triton.next_power_of_2(n))
    elif centre == "group" and config.block_rows % size == 0 and not inputs.spec.of_batch:
        centre, span = "block", size
    elif centre == "group":
        centre, span = "size", min(sweep, triton.next_power_of_2(size))
    if centre in ("none", "block", "later"):
        # the last program does not centre: N must not reach a constexpr, or the kernel is compiled again for some N
        sweep = min(configs.SWEEP, 1024)
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
    if not configs.fits(inputs):
        return reference.backward(grads, inputs, saved, needs)
    _, need_weight, _, need_norm = needs
    if inputs.num_rows == 0:
        targets = (getattr(inputs, name) for name in Needs._fields)
        return tuple(  # type: ignore[return-value]
            t.new_zeros(t.shape) if need and t is not None else None for t, need in zip(targets, needs, strict=True)
        )
    common = _common(inputs)
    rows, bias = _product_gradient(grads, inputs, common, saved, needs)
    grad_bias = None
    if bias is not None:
        assert inputs.bias is not None
        grad_bias = bias.sum(dim=0).to(inputs.bias.dtype)
    hidden = weight = norm = None
    if rows.scaled is not None:
        hidden, partials, gain = _outer_products(rows, inputs, common, needs)
        if partials is not None:
            weight, norm = _weight_gradient(partials, gain, inputs, common, need_weight, need_norm)
    return hidden, weight, grad_bias, norm


class RowGradients(NamedTuple):
    """What the outer products need of each row, all [N, ...] of ACC; None where nothing needs it."""

    scaled: Tensor | None  # [N, padded 2K] the product's gradient times rstd
    along: Tensor | None  # [N] hidden's gradient through a norm
    pulls: Tensor | None  # [N, padded R] the distance's gradient at its directions
    slopes: Tensor | None  # [N, 2] and at its diagonal


def _product_gradient(
    grads: OutputGrads, inputs: Inputs, common: dict[str, Any], saved: Tensor, needs: Needs
) -> tuple[RowGradients, Tensor | None]:
    """The rows' gradients, and the bias's as partials [programs, 2K]."""
    n, dtype, new = inputs.num_rows, inputs.output_dtype, inputs.hidden.new_empty
    need_hidden, need_weight, need_bias, need_norm = needs
    config = configs.gradient_config(configs.columns_of(inputs).all)
    programs = triton.cdiv(n, config.block_rows)
    d_reward, d_mean, d_std, d_sum, d_distance = grads
    priced = common["POWER"] > 0 and (d_reward is not None or d_sum is not None)
    through = (need_hidden or need_norm) and inputs.trust is not None and (priced or d_distance is not None)
    d_reward, averages, size = _centred(d_reward, inputs)
    scaled = new(n, common["BN"], dtype=dtype) if need_hidden or need_weight or need_norm else None
    along = new(n, dtype=dtype) if need_hidden and inputs.norm_weight is not None else None
    pulls = new(n, common["RN"], dtype=dtype) if through and common["R"] else None
    rows = RowGradients(scaled, along, pulls, new(n, 2, dtype=dtype) if through else None)
    bias = new(programs, 2 * inputs.num_heads, dtype=dtype) if need_bias else None
    strides = {
        name: 0 if tensor is None else tensor.stride(axis)
        for name, tensor, axis in (
            ("reward_stride", d_reward, 0),
            ("mean_row", d_mean, 0),
            ("mean_column", d_mean, 1),
            ("std_row", d_std, 0),
            ("std_column", d_std, 1),
            ("distance_stride", d_distance, 0),
        )
    }
    launch(
        product_gradient_kernel, (programs,), config, inputs.hidden.device,
        **{name: common[name] for name in _HEADS_ARGUMENTS}, **strides, saved=saved, grad_reward=d_reward,
        averages=averages, grad_mean=d_mean, grad_std=d_std, grad_sum=d_sum,
        grad_distance=d_distance, **rows._asdict(), bias_partials=bias, size=size, M=config.block_rows,
    )  # fmt: skip
    return rows, bias


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
    rows: RowGradients, inputs: Inputs, common: dict[str, Any], needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradient of hidden, the folded weight's gradient as [shares, 2K, D] partials, and the part of the norm weight's
    that comes through the distance as [shares, D] partials.
    """
    n, d, k = inputs.num_rows, common["d"], inputs.num_heads
    need_hidden, need_weight, _, need_norm = needs
    need_folded = need_weight or need_norm
    need_gain = need_norm and inputs.norm_weight is not None and rows.slopes is not None
    arguments = {name: common[name] for name in _OUTER_ARGUMENTS}
    out = None
    if need_hidden and inputs.rows is None:
        out = inputs.hidden.new_empty(n, d)
    elif need_hidden:
        out = inputs.hidden.new_zeros(inputs.hidden.shape)
        rows, arguments["rows"] = _combined(rows, inputs, common)
    new, dtype, columns = inputs.hidden.new_empty, inputs.output_dtype, configs.columns_of(inputs)
    measured, target = rows.slopes is not None, configs.platform(inputs.hidden.device).name

    def run(config: Config) -> tuple[Tensor | None, Tensor | None]:
        blocks_each, shares = configs.row_shares(n, d, config, inputs.hidden.device)
        partials = new(shares, 2 * k, d, dtype=dtype) if need_folded else None
        gain = new(shares, d, dtype=dtype) if need_gain else None
        launch(
            outer_kernel, (triton.cdiv(d, config.block_dim), shares), config, inputs.hidden.device,
            **arguments, **rows._asdict(), grad_hidden=out, weight_partials=partials, gain_partials=gain,
            blocks_each=blocks_each, M=config.block_rows, BD=config.block_dim,
        )  # fmt: skip
        return partials, gain

    config = tuning.choose(
        configs.outer_config(columns, inputs.hidden.dtype, target, measured),
        configs.outer_candidates(columns, inputs.hidden.dtype, target, measured),
        ("ensemble_reward.outer", need_hidden, need_folded, *(("distance",) if measured else ()),
         *configs.bucket(n, columns, d, inputs.hidden.dtype)),
        run, inputs.hidden.device,
    )  # fmt: skip
    return out, *run(config)


def _combined(rows: RowGradients, inputs: Inputs, common: dict[str, Any]) -> tuple[RowGradients, Tensor]:
    """Add up the rows' gradients over the positions that score the same row.

    Returns the sums in the order of the sorted rows, and the sorted rows with -1 at repeats.
    """
    config = configs.gradient_config(configs.columns_of(inputs).all)
    sorted_rows, order = torch.sort(common["rows"], stable=True)
    out = RowGradients(*(None if tensor is None else torch.empty_like(tensor) for tensor in rows))
    targets = torch.empty_like(sorted_rows)
    launch(
        combine_kernel, (triton.cdiv(common["num_rows"], config.block_rows),), config, targets.device,
        **rows._asdict(), **{f"{name}_out": tensor for name, tensor in out._asdict().items()},
        sorted_rows=sorted_rows, order=order, targets=targets, num_rows=common["num_rows"], M=config.block_rows,
        BN=common["BN"], RN=common["RN"], ACC=common["ACC"],
    )  # fmt: skip
    return out, targets


def _weight_gradient(
    partials: Tensor, gain: Tensor | None, inputs: Inputs, common: dict[str, Any], need_weight: bool, need_norm: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Add the partials in ascending order, and separate the gradients of the head's and the norm's weight."""
    weight = torch.empty_like(common["weight"]) if need_weight else None
    norm = torch.empty_like(common["norm_weight"]) if need_norm and inputs.norm_weight is not None else None
    config = configs.weight_config(common["BN"])
    names = ("weight", "norm_weight", "d", "K", "BN", "ACC")
    launch(
        weight_gradient_kernel, (triton.cdiv(common["d"], config.block_dim),), config, partials.device,
        **{name: common[name] for name in names}, weight_partials=partials, gain_partials=gain, grad_weight=weight,
        grad_norm_weight=norm, shares=partials.shape[0], BD=config.block_dim,
    )  # fmt: skip
    return weight, norm
