"""The public `preference_step` and its registration as `prudent::preference_step`.

The op returns gradients; it is not itself differentiable. A plain eager call goes straight to the backend, every other
call through the registered op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..eager import is_plain
from ..ensemble_reward import STD_FLOOR
from . import reference
from .contract import NUMBERS, Inputs, Outputs, StepOutput, check_inputs, check_values, checks

_library = torch.library.Library("prudent", "FRAGMENT")
_library.define(
    "preference_step(Tensor features, Tensor weight, Tensor bias, Tensor? rows, Tensor? head_id, Tensor? p_hat, "
    "Tensor? margin, Tensor? seed, str loss, float alpha, float bsr, float centre, float std_floor) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _backend(inputs: Inputs) -> Any:
    """The module that executes this call, imported when first needed: `import prudent` must not import triton."""
    if inputs.features.is_cuda:
        from . import triton  # type: ignore[attr-defined]

        return triton
    if inputs.features.device.type == "cpu" and inputs.features.dtype != torch.float64:
        from . import cpu

        if cpu.available():
            return cpu
    return reference


def _step(*arguments: Any) -> Outputs:
    return _run(Inputs(*arguments))


def _run(inputs: Inputs) -> Outputs:
    check_inputs(inputs)
    check_values(inputs)
    result: Outputs = _backend(inputs).step(inputs)
    return result


def _fake(*arguments: Any) -> Outputs:
    inputs = Inputs(*arguments)
    check_inputs(inputs)

    def number() -> Tensor:
        return inputs.features.new_empty((), dtype=inputs.output_dtype)

    weight, bias = inputs.weight.new_empty(inputs.weight.shape), inputs.bias.new_empty(inputs.bias.shape)
    return number(), weight, bias, number(), number()


for _device in ("CPU", "CUDA"):
    _library.impl("preference_step", _step, _device)
torch.library.register_fake("prudent::preference_step", _fake, lib=_library)


def preference_step(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    loss: str = "bt",
    rows: Tensor | None = None,
    head_id: Tensor | None = None,
    p_hat: Tensor | None = None,
    margin: Tensor | None = None,
    alpha: float = 4.0,
    seed: Tensor | None = None,
    bsr: float = 0.0,
    centre: float = 0.0,
    std_floor: float = STD_FLOOR,
) -> StepOutput:
    """Loss of P preference pairs under K Gaussian heads and its gradient by the heads, from one read of the features.

        z = features[rows] @ weight.T + bias     mean = z[:, :K]     std = softplus(z[:, K:]) + std_floor
        reward = mean over heads of mean         rows 0..P-1 chosen, P..2P-1 rejected
        bt:    mean over pairs of -log sigmoid(reward+ - reward- - margin)
        brme:  mean over pairs of (r+ - t)^2 + (r- + t)^2,  t = alpha (p_hat - 1/2),  r = mean + std * a of the
               pair's own head; its expectation over a ~ N(0, 1) without a seed (BRME, arXiv 2409.15360, eq. 8)
        both:  + bsr / (4P) * (sum of the 2P rewards)^2 + centre * mean over pairs of (reward+ + reward-)^2

    The result equals composing `ensemble_reward` with these losses and calling backward. Assign it and step:
    `weight.grad, bias.grad = out.dweight, out.dbias`.

    Args:
        features: [2P, D], or [R, D] with `rows`; bfloat16, float16, float32 or float64; last dimension contiguous, any
            row stride.
        weight: [2K, D]; rows 0..K-1 give the means, K..2K-1 the raw stds. Any floating dtype.
        bias: [2K] float32.
        loss: "bt", Bradley-Terry on the mean of heads, or "brme", eq. 8 on each pair's own head.
        rows: [2P] int64, the batch's rows of `features`, chosen first, then rejected; repeats allowed.
        head_id: [P] int64 in [0, K), the head that a pair trains ("brme").
        p_hat: [P] float32 in (0, 1), the stage-1 model's probability that chosen wins ("brme").
        margin: [P] float32, the required gap between the rewards ("bt").
        alpha: width of eq. 8's targets, +-alpha / 2.
        seed: [1] int64; with it eq. 8 is sampled: Philox noise at counter row * K + head, `ensemble_reward`'s own.
        bsr: lambda of batch-sum regularisation (arXiv 2505.07271).
        centre: eta of the centring penalty (Eisenstein et al., arXiv 2312.09244).
        std_floor: least std.

    Returns:
        StepOutput(loss, dweight, dbias, accuracy, std).

    Raises:
        ValueError: for a wrong argument, before anything is computed.
    """
    for name, number in zip(NUMBERS, (alpha, bsr, centre, std_floor), strict=True):
        checks.not_negative(number, name)
    inputs = Inputs(
        features=features, weight=weight, bias=bias, rows=rows, head_id=head_id, p_hat=p_hat, margin=margin, seed=seed,
        loss=loss, alpha=float(alpha), bsr=float(bsr), centre=float(centre), std_floor=float(std_floor),
    )  # fmt: skip
    with torch.no_grad():
        outputs: Outputs = _run(inputs) if is_plain(inputs.tensors) else torch.ops.prudent.preference_step(*inputs)
    result, dweight, dbias, accuracy, std = outputs
    return StepOutput(result, dweight, dbias, accuracy, std if loss == "brme" else None)
