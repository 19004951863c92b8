"""The public `ensemble_reward` and its registration as `prudent::ensemble_reward`.

Under torch.compile and torch.export the registered op is called (schema, fake, autograd). A plain eager call goes
straight to the same backend, with gradients through a `torch.autograd.Function`: the registered op's autograd in Python
costs more host time per call than scoring a small batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import split
from ..eager import is_plain
from . import cpu, reference
from .contract import (
    EnsembleOutput,
    Grads,
    Inputs,
    Needs,
    OutputGrads,
    Outputs,
    check_inputs,
    check_values,
    checks,
    refuse,
)
from .spec import Aggregation
from .trust import TrustRegion

STD_FLOOR = (
    1e-3  # keeps argmin-std and lcb away from 0; small beside the heads' spread, which eq. 8 sets at about alpha/2
)

_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor? norm_weight, Tensor? seed, Tensor? shift, "
    "Tensor? scale, Tensor? std_ref, Tensor? group, SymInt group_size, float norm_eps, float std_floor, "
    "str aggregation, Tensor? trust_mean, Tensor? trust_precision, Tensor? trust_directions, Tensor? trust_weights, "
    "Tensor? trust_unit, Tensor? trust_rms"
)
_library = torch.library.Library("prudent", "DEF")
# the registered op returns an empty distance without a trust region: an op's outputs must be tensors
_library.define(f"ensemble_reward({_SCHEMA}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "ensemble_reward_backward(Tensor? grad_reward, Tensor? grad_mean, Tensor? grad_std, Tensor? grad_sum, "
    f"Tensor? grad_distance, {_SCHEMA}, Tensor saved, bool need_hidden, bool need_weight, bool need_bias, "
    "bool need_norm_weight) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _backend(inputs: Inputs) -> Any:
    """The module that executes this call, imported when first needed: `import prudent` must not import triton."""
    if inputs.hidden.is_cuda:
        from . import triton  # type: ignore[attr-defined]

        return triton
    if inputs.hidden.is_cpu and inputs.hidden.dtype != torch.float64 and cpu.available():
        return cpu
    return reference


def _forward(*arguments: Any) -> Outputs:
    *given, keep = arguments
    return _run(Inputs(*given), keep)


def _registered_forward(*arguments: Any) -> Outputs:
    *outputs, distance, saved = _forward(*arguments)
    return *outputs, saved.new_empty(0) if distance is None else distance, saved  # type: ignore[return-value]


def _run(inputs: Inputs, keep: bool) -> Outputs:
    """Check the arguments and run the backend. C++ checks faster than Python, so for the native backend the Python
    checks run only after C++ has refused a call, to name the argument.
    """
    backend = _backend(inputs)
    if backend is cpu:
        try:
            return cpu.forward(inputs, keep)
        except RuntimeError:
            check_inputs(inputs)
            check_values(inputs)
            raise  # the arguments are right: it is another error
    if backend is not reference and (known := backend.again(inputs, keep)) is not None:
        return known  # type: ignore[no-any-return]
    check_inputs(inputs)
    check_values(inputs)
    result: Outputs = backend.forward(inputs, keep)
    return result


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads, inputs, saved, needs = split(arguments, OutputGrads, Inputs, Tensor, Needs)
    empty = inputs.hidden.new_empty(0)
    found = _run_backward(grads, inputs, saved, needs)
    return tuple(empty if g is None else g for g in found)  # type: ignore[return-value]


def _run_backward(grads: OutputGrads, inputs: Inputs, saved: Tensor, needs: Needs) -> Grads:
    found: Grads = _backend(inputs).backward(grads, inputs, saved, needs)
    return found


def _fake_forward(*arguments: Any) -> Outputs:
    *given, keep = arguments
    inputs = Inputs(*given)
    check_inputs(inputs)
    n, k, dtype = inputs.num_rows, inputs.num_heads, inputs.output_dtype
    shapes = (n,), (n, k), (n, k), (), (0 if inputs.trust is None else n,), (n if keep else 0, inputs.saved_columns)
    return tuple(inputs.hidden.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, inputs, _, needs = split(arguments, OutputGrads, Inputs, Tensor, Needs)
    targets = (getattr(inputs, name) for name in Needs._fields)
    # hidden may be a strided view: its gradient is a fresh contiguous tensor
    return tuple(  # type: ignore[return-value]
        target.new_empty(target.shape) if need and target is not None else inputs.hidden.new_empty(0)
        for target, need in zip(targets, needs, strict=True)
    )


for _device in ("CPU", "CUDA"):
    _library.impl("ensemble_reward", _registered_forward, _device)
    _library.impl("ensemble_reward_backward", _backward, _device)
torch.library.register_fake("prudent::ensemble_reward", _fake_forward, lib=_library)
torch.library.register_fake("prudent::ensemble_reward_backward", _fake_backward, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *values, _ = inputs
    given = Inputs(*values)
    *_, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(*given.tensors, saved)
    ctx.options = given.options


_DIFFERENTIABLE = tuple(Inputs._fields.index(name) for name in Needs._fields)  # positions among the arguments


def _autograd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient, or None, for each field of `Inputs` and for `keep`."""
    *outer, _ = grads  # `saved` has no gradient
    wanted = ctx.needs_input_grad
    needs = Needs(*(wanted[i] for i in _DIFFERENTIABLE))
    result: list[Tensor | None] = [None] * len(wanted)
    if any(g is not None for g in outer):
        *tensors, saved = ctx.saved_tensors
        found = ctx.run_backward(OutputGrads(*outer), Inputs.of(tensors, ctx.options), saved, needs)
        for i, gradient, need in zip(_DIFFERENTIABLE, found, needs, strict=True):
            result[i] = gradient if need else None
    return tuple(result)


def _registered_backward(
    grads: OutputGrads, inputs: Inputs, saved: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor]
    found = torch.ops.prudent.ensemble_reward_backward(*grads, *inputs, saved, *needs)
    return found


def _library_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    ctx.run_backward = _registered_backward
    return _autograd_backward(ctx, *grads)


torch.library.register_autograd(
    "prudent::ensemble_reward", _library_backward, setup_context=_setup_context, lib=_library
)


class _EagerEnsembleReward(torch.autograd.Function):
    """The registered op's autograd, with the same backend and saved tensors but less host time per call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Outputs:
        output = _forward(*arguments)
        _setup_context(ctx, inputs=arguments, output=output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.run_backward = _run_backward
        return _autograd_backward(ctx, *grads)


def _flattened(hidden: Tensor) -> Tensor:
    checks.tensor(hidden, "hidden")
    if hidden.shape[-1] == 0:
        refuse("hidden", "a last dimension above 0", list(hidden.shape))
    checks.last_dimension(hidden, "hidden")  # before flattening, which would copy the tensor
    return hidden.reshape(-1, hidden.shape[-1])


def _region(trust: TrustRegion | None) -> tuple[Tensor | None, ...]:
    """The trust region's fields of `Inputs`."""
    if trust is None:
        return (None,) * len(TrustRegion._fields)
    if not isinstance(trust, TrustRegion):
        refuse("trust", "a TrustRegion or None", type(trust).__name__)
    return trust


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
    trust: TrustRegion | None = None,
) -> EnsembleOutput:
    """Hidden states to a pessimistic reward in one op: BRME (arXiv 2409.15360) on K Gaussian heads.

        z      = rmsnorm(hidden[rows]) @ weight.T + bias                      fp32 accumulation
        mean   = (z[:, :K] - shift) / scale        std = (softplus(z[:, K:]) + std_floor) / scale
        sample = mean + std * a,  a ~ N(0, 1), Philox-4x32 keyed by seed at counter row * K + head
        distance = sqrt((f - mu)' P (f - mu)),  f = rmsnorm(hidden[rows]), mu and P of `trust`
        reward = aggregation(mean, std, sample) - price(distance) - centre

    Args:
        hidden: [..., D] bfloat16, float16, float32 or float64; last dimension contiguous, any row stride. Leading
            dimensions are flattened (a view where their strides allow it, else a copy).
        weight: [2K, D]; rows 0..K-1 give the means, K..2K-1 the raw stds. Any floating dtype.
        bias: [2K] float32.
        rows: [N] int64, the rows of hidden.view(-1, D) to score, repeats allowed; None: every row.
        norm_weight: [D], the trunk's final RMSNorm folded in; then `hidden` is the un-normalised state.
        norm_eps: the RMSNorm's epsilon.
        seed: [1] int64 on hidden's device; None: no sampling, the aggregation uses the means.
        shift, scale: [K] float32, fixed per-head calibration; scale > 0.
        std_ref: [K] float32 > 0, each head's typical std; needed by `nominal=relative_std`.
        group: [N] int64 labels in [0, N), or a group size (consecutive rows); with centre="group".
        aggregation: `Aggregation` or its string.
        centre: "none", "batch" or "group"; None: the aggregation's own ("none" by default).
        std_floor: least std before calibration.
        trust: the region of the features on which the reward was taught; needed by a price in the aggregation
            (`trust=c`), and without one only measured.

    Returns:
        EnsembleOutput(reward [N], mean [N, K], std [N, K], reward_sum [], distance [N] or None), fp32 (fp64 from fp64).
        Gradients flow to hidden, weight, bias and norm_weight, once differentiable.

    Raises:
        ValueError: for a wrong argument, before anything is computed.
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
    # do not parse a string here, so that torch.compile need not trace the parser
    text = aggregation if isinstance(aggregation, str) and centre is None else _spec_text(aggregation, centre)
    inputs = Inputs(
        hidden, weight.contiguous(), bias, rows, norm_weight, seed, shift, scale, std_ref, labels, group_size, norm_eps,
        std_floor, text, *_region(trust),
    )  # fmt: skip
    differentiable = (hidden, weight, bias, norm_weight)
    keep = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in differentiable)
    if not is_plain(inputs.tensors):
        outputs: Outputs = torch.ops.prudent.ensemble_reward(*inputs, keep)
    elif keep:
        outputs = _EagerEnsembleReward.apply(*inputs, keep)  # type: ignore[no-untyped-call]
    else:
        outputs = _run(inputs, keep)
    reward, mean, std, reward_sum, distance, _ = outputs
    return EnsembleOutput(reward, mean, std, reward_sum, None if trust is None else distance)
