"""The public `ensemble_reward` and its registration as `prudent::ensemble_reward`.

Two roads, one arithmetic. Under torch.compile and torch.export the registered op is called (schema, fake, autograd). A
plain eager call goes straight to the backend, with gradients through a `torch.autograd.Function`: a library op's Python
autograd registration costs more host time a call than a small batch takes to score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..eager import is_plain
from . import cpu, reference
from .contract import EnsembleOutput, Grads, Inputs, Outputs, check_inputs, check_values, checks, refuse
from .spec import Aggregation

STD_FLOOR = (
    1e-3  # keeps argmin-std and lcb away from 0; small beside the heads' spread, which eq. 8 sets at about alpha/2
)

_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor? norm_weight, Tensor? seed, Tensor? shift, "
    "Tensor? scale, Tensor? std_ref, Tensor? group, SymInt group_size, float norm_eps, float std_floor, str aggregation"
)
_library = torch.library.Library("prudent", "DEF")
_library.define(f"ensemble_reward({_SCHEMA}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "ensemble_reward_backward(Tensor? grad_reward, Tensor? grad_mean, Tensor? grad_std, Tensor? grad_sum, "
    f"{_SCHEMA}, Tensor saved, bool need_hidden, bool need_weight, bool need_bias, bool need_norm_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _backend(inputs: Inputs) -> Any:
    """The module that executes this call: imported when first needed, so that `import prudent` stays light."""
    if inputs.hidden.is_cuda:
        from . import triton  # type: ignore[attr-defined]

        return triton
    if inputs.hidden.is_cpu and inputs.hidden.dtype != torch.float64 and cpu.available():
        return cpu
    return reference


def _forward(*args: Any) -> Outputs:
    return _run(Inputs(*args[:14]), args[14])


def _run(inputs: Inputs, keep: bool) -> Outputs:
    """Refused in words, or computed. C++ checks all it is given, in less time than Python: words only if it refuses."""
    backend = _backend(inputs)
    if backend is cpu:
        try:
            return cpu.forward(inputs, keep)
        except RuntimeError:
            check_inputs(inputs)
            check_values(inputs)
            raise  # not for the arguments
    check_inputs(inputs)
    check_values(inputs)
    result: Outputs = backend.forward(inputs, keep)
    return result


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads, inputs, saved, needs = args[:4], Inputs(*args[4:18]), args[18], args[19:]
    results: Grads = _backend(inputs).backward(grads, inputs, saved, needs)
    empty = inputs.hidden.new_empty(0)
    return tuple(empty if r is None else r for r in results)  # type: ignore[return-value]


def _fake_forward(*args: Any) -> Outputs:
    inputs, keep = Inputs(*args[:14]), args[14]
    check_inputs(inputs)
    n, k, dtype = inputs.num_rows, inputs.num_heads, inputs.output_dtype
    new = inputs.hidden.new_empty
    heads = new(n, k, dtype=dtype), new(n, k, dtype=dtype)
    return new(n, dtype=dtype), *heads, new((), dtype=dtype), new(n if keep else 0, 2 * k + 1, dtype=dtype)


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, needs = Inputs(*args[4:18]), args[19:]
    targets = (inputs.hidden, inputs.weight, inputs.bias, inputs.norm_weight)
    # hidden may be a strided view: its gradient is a fresh contiguous tensor
    return tuple(  # type: ignore[return-value]
        target.new_empty(target.shape) if need and target is not None else inputs.hidden.new_empty(0)
        for target, need in zip(targets, needs, strict=True)
    )


for _device in ("CPU", "CUDA"):
    _library.impl("ensemble_reward", _forward, _device)
    _library.impl("ensemble_reward_backward", _backward, _device)
torch.library.register_fake("prudent::ensemble_reward", _fake_forward, lib=_library)
torch.library.register_fake("prudent::ensemble_reward_backward", _fake_backward, lib=_library)

_SAVED = ("hidden", "weight", "bias", "rows", "norm_weight", "seed", "shift", "scale", "std_ref", "group")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[4])
    ctx.save_for_backward(*inputs[: len(_SAVED)], output[4])
    ctx.options = inputs[len(_SAVED) : len(Inputs._fields)]


def _autograd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, rows, norm_weight, *rest, saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = (wanted[0], wanted[1], wanted[2], wanted[4])
    result: list[Tensor | None] = [None] * (len(Inputs._fields) + 1)
    if any(g is not None for g in grads[:4]):
        inputs = (hidden, weight, bias, rows, norm_weight, *rest, *ctx.options)
        found = ctx.run_backward(*grads[:4], *inputs, saved, *needs)
        for position, gradient, need in zip((0, 1, 2, 4), found, needs, strict=True):
            result[position] = gradient if need else None
    return tuple(result)


def _library_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    ctx.run_backward = torch.ops.prudent.ensemble_reward_backward
    return _autograd_backward(ctx, *grads)


torch.library.register_autograd(
    "prudent::ensemble_reward", _library_backward, setup_context=_setup_context, lib=_library
)


class _EagerEnsembleReward(torch.autograd.Function):
    """The registered op's autograd without its registration cost; same backend, same saved tensors."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Outputs:
        output = _forward(*args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.run_backward = _backward
        return _autograd_backward(ctx, *grads)


def _flattened(hidden: Tensor) -> Tensor:
    checks.tensor(hidden, "hidden")
    if hidden.shape[-1] == 0:
        refuse("hidden", "a last dimension above 0", list(hidden.shape))
    checks.last_dimension(hidden, "hidden")  # before flattening, which would hide it behind a copy
    return hidden.reshape(-1, hidden.shape[-1])


def _spec_text(aggregation: str | Aggregation, centre: str | None) -> str:
    return str(Aggregation.parse(aggregation).with_centre(centre))


def ensemble_reward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    seed: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    std_ref: Tensor | None = None,
    group: Tensor | int | None = None,
    aggregation: str | Aggregation = "tradeoff:0.4",
    centre: str | None = None,
    std_floor: float = STD_FLOOR,
) -> EnsembleOutput:
    """Hidden states to a pessimistic reward in one op: BRME (arXiv 2409.15360) on K Gaussian heads.

        z      = rmsnorm(hidden[rows]) @ weight.T + bias                      fp32 accumulation
        mean   = (z[:, :K] - shift) / scale        std = (softplus(z[:, K:]) + std_floor) / scale
        sample = mean + std * a,  a ~ N(0, 1), Philox-4x32 keyed by seed at counter row * K + head
        reward = aggregation(mean, std, sample) - centre

    Args:
        hidden: [..., D] bfloat16, float16, float32 or float64; last dimension contiguous, any row stride. Leading
            dimensions are flattened (a view where their strides allow it, else a copy).
        weight: [2K, D]; rows 0..K-1 give the means, K..2K-1 the raw stds. Any floating dtype.
        bias: [2K] float32.
        rows: [N] int64, which rows of hidden.view(-1, D) to score; None scores every row. May repeat.
        norm_weight: [D], the trunk's final RMSNorm folded in; then `hidden` is the un-normalised state.
        norm_eps: the RMSNorm's epsilon.
        seed: [1] int64 on hidden's device; None: no sampling, the means stand for the samples.
        shift, scale: [K] float32, fixed per-head calibration; scale > 0.
        std_ref: [K] float32 > 0, each head's own typical std; needed by `nominal=relative_std`.
        group: [N] int64 labels in [0, N), or a group size (consecutive rows); with centre="group".
        aggregation: `Aggregation` or its string.
        centre: "none", "batch" or "group"; None takes the aggregation's own (default none).
        std_floor: least std before calibration.

    Returns:
        EnsembleOutput(reward [N], mean [N, K], std [N, K], reward_sum []), fp32 (fp64 from fp64). Gradients flow to
        hidden, weight, bias and norm_weight, once differentiable.

    Raises:
        ValueError: naming the argument, what was expected and what came, before anything is computed.
    """
    if not isinstance(hidden, Tensor) or hidden.dim() < 1:
        got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        refuse("hidden", "a tensor [..., D]", got)
    if hidden.dim() != 2:
        hidden = _flattened(hidden)
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        checks.tensor(weight, "weight")
    labels, group_size = None, 0
    if isinstance(group, Tensor):
        labels = group
    elif group is not None:
        if type(group) is not int:
            refuse("group", "a tensor of labels or a size", type(group).__name__)
        if group <= 0:
            refuse("group", "a size above 0", group)
        group_size = group
    # a string goes through unparsed: the compiler need not trace the parser
    text = aggregation if isinstance(aggregation, str) and centre is None else _spec_text(aggregation, centre)
    vectors = bias, rows, norm_weight, seed, shift, scale, std_ref, labels
    inputs = Inputs(hidden, weight.contiguous(), *vectors, group_size, norm_eps, std_floor, text)
    keep = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs[:5])
    if not is_plain(inputs[:10]):
        return EnsembleOutput(*torch.ops.prudent.ensemble_reward(*inputs, keep)[:4])
    if keep:
        return EnsembleOutput(*_EagerEnsembleReward.apply(*inputs, True)[:4])  # type: ignore[no-untyped-call]
    return EnsembleOutput(*_run(inputs, False)[:4])
