"""The public `advantages` and its registration as `prudent::advantages`.

Under torch.compile and torch.export the registered op is called (schema, fake); a plain eager call goes straight to the
backend. Advantages are data for the policy loss, so neither path has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..eager import is_plain
from . import reference
from .contract import AdvantageOutput, AdvantageStats, Inputs, Outputs, check_inputs, checks, require

_library = torch.library.Library("prudent", "FRAGMENT")
_library.define(
    "advantages(Tensor score, Tensor? logprob, Tensor? ref_logprob, Tensor? value, Tensor mask, float gamma, "
    "float lam, float kl_coef, str kl_estimator, float kl_clip, str holes, str score_at, str whiten) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _backend(inputs: Inputs) -> Any:
    """The module that executes this call, imported when first needed: `import prudent` must not import triton."""
    if inputs.mask.is_cuda:
        from . import triton  # type: ignore[attr-defined]

        return triton
    if inputs.mask.device.type == "cpu":
        from . import cpu

        if cpu.available():
            return cpu
    return reference


def _forward(*arguments: Any) -> Outputs:
    return _run(Inputs(*arguments))


def _run(inputs: Inputs) -> Outputs:
    check_inputs(inputs)
    if inputs.mask.numel() == 0:
        return _new(inputs, torch.zeros)
    result: Outputs = _backend(inputs).forward(inputs)
    return result


def _new(inputs: Inputs, make: Any) -> Outputs:
    """The outputs, allocated by `make`: torch.empty or torch.zeros."""
    (batch, length), device, dtype = inputs.mask.shape, inputs.mask.device, inputs.output_dtype
    tokens = (make((batch, length), dtype=dtype, device=device) for _ in range(3))
    return *tokens, make(batch, dtype=torch.bool, device=device), make(6, dtype=dtype, device=device)  # type: ignore[return-value]


def _fake(*arguments: Any) -> Outputs:
    inputs = Inputs(*arguments)
    check_inputs(inputs)
    return _new(inputs, torch.empty)


def _mark_outputs(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    return (None,) * len(Inputs._fields)


for _device in ("CPU", "CUDA"):
    _library.impl("advantages", _forward, _device)
torch.library.register_fake("prudent::advantages", _fake, lib=_library)
torch.library.register_autograd("prudent::advantages", _no_gradient, setup_context=_mark_outputs, lib=_library)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def advantages(
    score: Tensor,
    logprob: Tensor | None,
    ref_logprob: Tensor | None,
    value: Tensor | None,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    kl_clip: float | None = None,
    holes: str = "skip",
    score_at: str = "last",
    whiten: str = "sample",
) -> AdvantageOutput:
    """KL-shaped rewards, generalised advantage estimation (arXiv 1506.02438, eq. 16) and masked whitening in one op.

        r_t = score (at the last token) - kl_coef * KL_t
        A_t = r_t + gamma V_next - V_t + gamma lam A_next         returns_t = A_t + V_t
        advantage = (A - mean) / std over the unmasked tokens of the batch

    Args:
        score: [B], one per sequence, or [B, T], one per token. It and the next three arguments: any floating dtype.
        logprob, ref_logprob: [B, T] log-probabilities of the sampled tokens under the policy that sampled them and the
            reference. Both None: no KL, with kl_coef=0.
        value: [B, T] the critic's values before each token; None: no critic, lam is ignored, and the advantage is the
            discounted reward-to-go.
        mask: [B, T] bool or integer, 0 at masked tokens: padding on either side, and holes (tool output between two
            turns). Values at masked tokens, even NaN, affect no result.
        gamma, lam: in [0, 1].
        kl_coef: >= 0, the price of KL in the reward.
        kl_estimator: "k1" d, "k2" d^2 / 2, "k3" e^-d - 1 + d, "abs" |d|, with d = logprob - ref_logprob.
        kl_clip: bound on the absolute value of each token's KL estimate; None: no bound.
        holes: "skip": V_next and A_next are those of the next unmasked token, without discount for the hole. "zero": a
            masked token is a step with reward and value 0, through which gamma and lam discount.
        score_at: "last": a [B] score comes with the last unmasked token. "after": one step later if the row is long
            enough; that step then has a value, a reward and a return, but no KL and no advantage.
        whiten: "sample" (A - mean) / sqrt(var + 1e-8), var with ddof 1; "population" (A - mean) / sqrt(max(var, 1e-8)),
            ddof 0; "centre" A - mean; "none".

    `advantage_convention("trl" | "openrlhf" | "verl")` returns kl_estimator to whiten as that trainer sets them.

    Returns:
        AdvantageOutput(advantage, returns, reward [B, T], dropped [B], stats), fp32 (fp64 if an input is), without
        gradients. A sequence with an advantage that is not finite is dropped: all its outputs are 0, `dropped` marks
        it, and no statistic includes it. The outputs of a sequence without unmasked tokens are 0, and no statistic
        includes it.

    Raises:
        ValueError: for a wrong argument, before anything is computed.
    """
    checks.tensor(mask, "mask")
    integer = not (mask.dtype.is_floating_point or mask.dtype.is_complex)
    require(integer, "mask", "dtype bool or an integer dtype", mask.dtype)
    inputs = Inputs(
        score=_detached(score), logprob=_detached(logprob), ref_logprob=_detached(ref_logprob), value=_detached(value),
        mask=mask if mask.dtype == torch.bool else mask != 0, gamma=gamma, lam=lam, kl_coef=kl_coef,
        kl_estimator=kl_estimator, kl_clip=float("inf") if kl_clip is None else kl_clip, holes=holes,
        score_at=score_at, whiten=whiten,
    )  # fmt: skip
    outputs: Outputs = _run(inputs) if is_plain(inputs.tensors) else torch.ops.prudent.advantages(*inputs)
    advantage, returns, reward, dropped, stats = outputs
    return AdvantageOutput(advantage, returns, reward, dropped, AdvantageStats(*stats.unbind()))
