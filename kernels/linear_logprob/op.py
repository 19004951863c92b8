"""The public `linear_logprob` and its registration as `prudent::linear_logprob`.

Under torch.compile and torch.export the registered op is called (schema, fake, autograd). A plain eager call goes
straight to the backend, with gradients through a `torch.autograd.Function`, and on a CPU searches for ignored targets
once, not once in the forward and once in the backward as the registered op does. So does a call with a process group,
which a registered op cannot take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import split
from ..eager import is_plain
from .call import empty_numerators
from .contract import (
    DERIVATIVE,
    Grads,
    Inputs,
    LogprobOutput,
    Needs,
    OutputGrads,
    Results,
    Saved,
    check_inputs,
    check_keep_bytes,
    check_values,
    checks,
)
from .parallel import check_group

_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor target, float temperature, float? softcap, int? ignore_index, Tensor? bias"
)
_library = torch.library.Library("prudent", "FRAGMENT")
_library.define(f"linear_logprob({_SCHEMA}, int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "linear_logprob_backward(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, "
    f"{_SCHEMA}, Tensor entropy, Tensor lse, Tensor? kept, Tensor? peaks, int keep, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def _backend(inputs: Inputs) -> Any:
    """The module that executes this call, imported when first needed: `import prudent` must not import triton."""
    if inputs.hidden.is_cuda:
        from . import triton  # type: ignore[attr-defined]

        return triton
    from . import chunked

    return chunked


def _run(inputs: Inputs, keep: int, group: Any = None) -> tuple[Results, Tensor | None]:
    """The results, and the rows that are computed (None: all)."""
    check_inputs(inputs)
    if group is not None:
        check_group(inputs, group)
    check_values(inputs, 1 if group is None else group.size())
    backend = _backend(inputs)
    rows = backend.scored_rows(inputs)
    return backend.forward(inputs, rows, keep, group), rows


def _forward(*arguments: Any) -> Results:
    *given, keep = arguments
    results, _ = _run(Inputs(*given), keep)
    return results


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grads, inputs, saved, needs = split(arguments, OutputGrads, Inputs, Saved, Needs)
    backend = _backend(inputs)
    found: Grads = backend.backward(grads, inputs, backend.scored_rows(inputs), saved, needs)
    return tuple(inputs.hidden.new_empty(0) if g is None else g for g in found)  # type: ignore[return-value]


def _fake_forward(*arguments: Any) -> Results:
    *given, keep = arguments
    inputs = Inputs(*given)
    check_inputs(inputs)
    shape, dtype, new = inputs.target.shape, inputs.accumulator, inputs.hidden.new_empty
    kept, peaks = new(0), new(0)
    if keep == DERIVATIVE:
        kept = new(inputs.target.numel(), inputs.hidden.shape[-1])
    elif keep > 0:
        kept, peaks = empty_numerators(inputs, keep, "gpu" if inputs.hidden.device.type == "cuda" else "cpu")
    logprob, entropy, lse = (new(shape, dtype=dtype) for _ in range(3))
    return Results(logprob, entropy, lse, kept, peaks)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, inputs, _, needs = split(arguments, OutputGrads, Inputs, Saved, Needs)
    likes = (inputs.hidden, inputs.weight, inputs.bias)
    return tuple(  # type: ignore[return-value]
        inputs.hidden.new_empty(0) if like is None or not need else like.new_empty(like.shape)
        for like, need in zip(likes, needs, strict=True)
    )


for _device in ("CPU", "CUDA"):
    _library.impl("linear_logprob", _forward, _device)
    _library.impl("linear_logprob_backward", _backward, _device)
torch.library.register_fake("prudent::linear_logprob", _fake_forward, lib=_library)
torch.library.register_fake("prudent::linear_logprob_backward", _fake_backward, lib=_library)


def _save(ctx: Any, inputs: Inputs, results: Results, keep: int, *more: Any) -> None:
    """Save for the backward: hidden, weight, target, bias, the four tensors of Saved, and `more` tensors."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(results.kept, results.peaks)
    ctx.save_for_backward(*inputs.tensors, inputs.bias, *results[1:], *more)
    ctx.options, ctx.keep = inputs.options, keep


def _saved(ctx: Any) -> tuple[Inputs, Saved, list[Any]]:
    hidden, weight, target, bias, entropy, lse, kept, peaks, *more = ctx.saved_tensors
    temperature, softcap, ignore_index = ctx.options
    inputs = Inputs(hidden, weight, target, temperature, softcap, ignore_index, bias)
    return inputs, Saved(entropy, lse, kept, peaks, ctx.keep), more


def _needs(ctx: Any) -> Needs:
    hidden, weight, _, _, _, _, bias, *_ = ctx.needs_input_grad
    return Needs(hidden, weight, bias)


def _of_every_input(found: Grads, ctx: Any) -> tuple[Tensor | None, ...]:
    """A gradient or None for each argument of the forward, as autograd requires."""
    hidden, weight, bias = found
    return hidden, weight, None, None, None, None, bias, *(None,) * (len(ctx.needs_input_grad) - 7)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *given, keep = inputs
    _save(ctx, Inputs(*given), Results(*output), keep)


def _library_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    outer = OutputGrads(*grads[:3])
    if all(g is None for g in outer):
        return _of_every_input((None, None, None), ctx)
    inputs, saved, _ = _saved(ctx)
    needs = _needs(ctx)
    found = torch.ops.prudent.linear_logprob_backward(*outer, *inputs, *saved, *needs)
    wanted = (g if need else None for g, need in zip(found, needs, strict=True))
    return _of_every_input(tuple(wanted), ctx)  # type: ignore[arg-type]


torch.library.register_autograd(
    "prudent::linear_logprob", _library_backward, setup_context=_setup_context, lib=_library
)


class _EagerLinearLogprob(torch.autograd.Function):
    """The registered op's autograd with less host time per call, without a second search for ignored targets, and with
    a process group.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *given, keep, ctx.group = arguments
        inputs = Inputs(*given)
        results, rows = _run(inputs, keep, ctx.group)
        _save(ctx, inputs, results, keep, rows)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        outer = OutputGrads(*grads[:3])
        if all(g is None for g in outer):
            return _of_every_input((None, None, None), ctx)
        inputs, saved, (rows,) = _saved(ctx)
        return _of_every_input(_backend(inputs).backward(outer, inputs, rows, saved, _needs(ctx), ctx.group), ctx)


def _keep(inputs: Inputs, keep_bytes: int | None) -> int:
    """The registered op's `keep`: see contract.py. Reads only whether gradients are needed."""
    hidden, weight, bias = (isinstance(t, Tensor) and t.requires_grad for t in (inputs[0], inputs[1], inputs.bias))
    if not torch.is_grad_enabled() or not (hidden or weight or bias):
        return 0
    if keep_bytes is None:
        return DERIVATIVE if hidden and not weight and not bias else 0
    return keep_bytes


def _parallel(inputs: Inputs, keep: int, group: Any) -> LogprobOutput:
    """A call with the vocabulary split over `group`, which is eager: a registered op cannot take a process group."""
    plain = isinstance(inputs.hidden, Tensor) and not inputs.hidden.is_meta and is_plain((*inputs.tensors, inputs.bias))
    if not plain:
        checks.refuse("group", "None unless hidden, weight and target are plain tensors with values", "a group")
    return LogprobOutput(*_EagerLinearLogprob.apply(*inputs, keep, group)[:3])  # type: ignore[no-untyped-call]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    keep_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> LogprobOutput:
    """Log-probabilities of targets and entropies under softmax(hidden @ weight.T + bias), with no [T, V] tensor.

        z       = hidden @ weight.T + bias                                      fp32 sums
        x       = softcap * tanh(z / softcap) / temperature                     (no cap: z / temperature)
        lse     = log sum_j exp x_j        logprob = x_target - lse        entropy = lse - sum_j softmax(x)_j x_j

    Args:
        hidden: [..., D] bfloat16, float16, float32 or float64; last dimension contiguous, any strides before it.
        weight: [V, D], any of these dtypes (float64 only with float64 hidden); may be the tied embedding. If the two
            dtypes differ, the product is in fp32.
        target: [...] int64, in [0, V) or ignore_index.
        bias: [V], any of these dtypes, or None.
        temperature: > 0; divides the capped logits.
        softcap: > 0 or None, Gemma 2's final logit cap (arXiv 2408.00118, section 2).
        ignore_index: the value of targets to ignore: their outputs and gradients are 0, whatever their hidden states
            are. A CPU drops their rows before the product. A GPU computes and masks them, so that the host never waits:
            if many are ignored, pass the other rows alone. None: no target is ignored.
        keep_bytes: what the forward keeps for the backward, if gradients are needed. None: if only hidden needs a
            gradient, d logprob / d hidden [T, D], which makes forward and backward two products instead of three, or
            four if the loss also depends on entropy or lse; otherwise nothing. 0: nothing. n > 0: at most n bytes of
            softmax numerators [K, V], in the products' dtype, which save K rows one product of three or four, whatever
            the loss.
        group: the vocabulary is split over this process group, as in Megatron-LM: rank r of p has rows
            [r V, (r + 1) V) of the whole weight and bias, the same number on every rank; hidden and target are the same
            on every rank, target in [0, p V). All ranks must call, forward and backward. Outputs and hidden's gradient
            are equal on all ranks; the gradients of weight and bias are this rank's rows'. Not under torch.compile,
            where the call breaks the graph.

    Returns:
        LogprobOutput(logprob, entropy, lse), each of target's shape, in nats; fp32 (fp64 from fp64). Gradients of all
        three flow to hidden, weight and bias, once differentiable.

    Raises:
        ValueError: for a wrong argument, before anything is computed. Target values, and the number of rows on the
            ranks of a group, are checked on a CPU, elsewhere only with PRUDENT_DEBUG=1; an unchecked target that is no
            token has logprob NaN.
    """
    inputs = Inputs(hidden, weight, target, temperature, softcap, ignore_index, bias)
    check_keep_bytes(keep_bytes)
    keep = _keep(inputs, keep_bytes)
    if group is not None:
        from .outside_compile import outside_compile

        found: LogprobOutput = outside_compile(_parallel, inputs, keep, group)
        return found
    meta = isinstance(hidden, Tensor) and hidden.is_meta  # without values: the registered fake gives the shapes
    if meta or not is_plain((*inputs.tensors, bias)):
        return LogprobOutput(*torch.ops.prudent.linear_logprob(*inputs, keep)[:3])
    differentiable = (t for t in (hidden, weight, bias) if isinstance(t, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        return LogprobOutput(*_EagerLinearLogprob.apply(*inputs, keep, None)[:3])  # type: ignore[no-untyped-call]
    return LogprobOutput(*_forward(*inputs, keep)[:3])
