"""The public `linear_logprob` and its registration as `prudent::linear_logprob`.

Under torch.compile and torch.export the registered op is called (schema, fake, autograd). A plain eager call goes
straight to the backend, with gradients through a `torch.autograd.Function`, and searches for ignored targets once, not
once in the forward and once in the backward as the registered op does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import split
from ..eager import is_plain
from .contract import Grads, Inputs, LogprobOutput, Needs, OutputGrads, Outputs, check_inputs, check_values, kept_rows

_SCHEMA = "Tensor hidden, Tensor weight, Tensor target, float temperature, float? softcap, int? ignore_index"
_library = torch.library.Library("prudent", "FRAGMENT")
_library.define(f"linear_logprob({_SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.define(
    "linear_logprob_backward(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, "
    f"{_SCHEMA}, Tensor entropy, Tensor lse, bool need_hidden, bool need_weight) -> (Tensor, Tensor)"
)


def _backend(inputs: Inputs) -> Any:
    """The module that executes this call, imported when first needed: `import prudent` must not import triton."""
    if inputs.hidden.is_cuda:
        from . import triton  # type: ignore[attr-defined]

        return triton
    from . import chunked

    return chunked


def _run(inputs: Inputs) -> tuple[Outputs, Tensor | None]:
    """The outputs, and the rows that are not ignored (None: all)."""
    check_inputs(inputs)
    check_values(inputs)
    rows = kept_rows(inputs.target, inputs.ignore_index)
    return _backend(inputs).forward(inputs, rows), rows


def _forward(*arguments: Any) -> Outputs:
    outputs, _ = _run(Inputs(*arguments))
    return outputs


def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    grads, inputs, entropy, lse, needs = split(arguments, OutputGrads, Inputs, Tensor, Tensor, Needs)
    rows = kept_rows(inputs.target, inputs.ignore_index)
    found: Grads = _backend(inputs).backward(grads, inputs, rows, entropy, lse, needs)
    empty = inputs.hidden.new_empty(0)
    return tuple(empty if g is None else g for g in found)  # type: ignore[return-value]


def _fake_forward(*arguments: Any) -> Outputs:
    inputs = Inputs(*arguments)
    check_inputs(inputs)
    shape, dtype = inputs.target.shape, inputs.accumulator
    return tuple(inputs.hidden.new_empty(shape, dtype=dtype) for _ in range(3))  # type: ignore[return-value]


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, inputs, _, _, needs = split(arguments, OutputGrads, Inputs, Tensor, Tensor, Needs)
    hidden, weight, _ = inputs.tensors
    return tuple(  # type: ignore[return-value]
        like.new_empty(like.shape) if need else hidden.new_empty(0)
        for like, need in zip((hidden, weight), needs, strict=True)
    )


for _device in ("CPU", "CUDA"):
    _library.impl("linear_logprob", _forward, _device)
    _library.impl("linear_logprob_backward", _backward, _device)
torch.library.register_fake("prudent::linear_logprob", _fake_forward, lib=_library)
torch.library.register_fake("prudent::linear_logprob_backward", _fake_backward, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    given = Inputs(*inputs)
    _, entropy, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given.tensors, entropy, lse)
    ctx.options = given.options


def _needs(ctx: Any) -> Needs:
    hidden, weight, *_ = ctx.needs_input_grad
    return Needs(hidden, weight)


def _of_every_input(hidden: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient or None for each argument of the forward, as autograd requires."""
    return hidden, weight, None, None, None, None


def _library_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(g is None for g in grads):
        return _of_every_input(None, None)
    *tensors, entropy, lse = ctx.saved_tensors
    needs = _needs(ctx)
    hidden, weight = torch.ops.prudent.linear_logprob_backward(*grads, *tensors, *ctx.options, entropy, lse, *needs)
    return _of_every_input(hidden if needs.hidden else None, weight if needs.weight else None)


torch.library.register_autograd(
    "prudent::linear_logprob", _library_backward, setup_context=_setup_context, lib=_library
)


class _EagerLinearLogprob(torch.autograd.Function):
    """The registered op's autograd with less host time per call and without a second search for ignored targets."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Outputs:
        inputs = Inputs(*arguments)
        output, rows = _run(inputs)
        _, entropy, lse = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs.tensors, entropy, lse, rows)
        ctx.options = inputs.options
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return _of_every_input(None, None)
        *tensors, entropy, lse, rows = ctx.saved_tensors
        inputs = Inputs(*tensors, *ctx.options)
        found: Grads = _backend(inputs).backward(OutputGrads(*grads), inputs, rows, entropy, lse, _needs(ctx))
        return _of_every_input(*found)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
) -> LogprobOutput:
    """Log-probabilities of targets and entropies under softmax(hidden @ weight.T), with no [T, V] tensor.

        x       = softcap * tanh(hidden @ weight.T / softcap) / temperature     fp32 (no cap: the product itself)
        lse     = log sum_j exp x_j        logprob = x_target - lse        entropy = lse - sum_j softmax(x)_j x_j

    Args:
        hidden: [..., D] bfloat16, float16, float32 or float64; last dimension contiguous, any strides before it.
        weight: [V, D], any of these dtypes (float64 only with float64 hidden); may be the tied embedding. There is no
            bias. If the two dtypes differ, the product is in fp32.
        target: [...] int64, in [0, V) or ignore_index.
        temperature: > 0; divides the capped logits.
        softcap: > 0 or None, Gemma 2's final logit cap (arXiv 2408.00118, section 2).
        ignore_index: the value of targets to ignore: their outputs and gradients are 0, and their rows are dropped
            before the product; on a GPU the host waits once for their number. None: no target is ignored, and the host
            does not wait.

    Returns:
        LogprobOutput(logprob, entropy, lse), each of target's shape, in nats; fp32 (fp64 from fp64). Gradients of all
        three flow to hidden and weight, once differentiable.

    Raises:
        ValueError: for a wrong argument, before anything is computed. Target values are checked on a CPU, elsewhere
            only with PRUDENT_DEBUG=1; an unchecked target outside [0, V) has logprob NaN.
    """
    inputs = Inputs(hidden, weight, target, temperature=temperature, softcap=softcap, ignore_index=ignore_index)
    meta = isinstance(hidden, Tensor) and hidden.is_meta  # without values: the registered fake gives the shapes
    if meta or not is_plain(inputs.tensors):
        return LogprobOutput(*torch.ops.prudent.linear_logprob(*inputs))
    differentiable = (t for t in (hidden, weight) if isinstance(t, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        return LogprobOutput(*_EagerLinearLogprob.apply(*inputs))  # type: ignore[no-untyped-call]
    return LogprobOutput(*_forward(*inputs))
