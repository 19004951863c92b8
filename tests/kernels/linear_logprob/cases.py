"""Inputs for the tests of `linear_logprob`, the expected results, and the unfused composition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prudent.kernels.linear_logprob import LogprobOutput, linear_logprob, reference
from prudent.kernels.linear_logprob.contract import Inputs, Needs, OutputGrads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
T, D, V = 11, 9, 37


def make(
    t: int = T, d: int = D, v: int = V, dtype: torch.dtype = torch.float64, ignored: tuple[int, ...] = (), **given: Any
) -> Inputs:
    """Logits of standard deviation 2, so that neither the target nor the rest of the distribution is negligible."""
    g = torch.Generator().manual_seed(t * 10007 + v)
    target = torch.randint(0, v, (t,), generator=g)
    target[list(ignored)] = -100
    values: dict[str, Any] = {
        "hidden": torch.randn(t, d, generator=g, dtype=torch.float64).to(dtype),
        "weight": (2 * torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5).to(dtype),
        "target": target,
        "temperature": 1.0,
        "softcap": None,
        "ignore_index": -100,
    }
    values.update(given)
    if isinstance(values.get("bias"), Tensor):
        values["bias"] = values["bias"].to(dtype)
    return Inputs(**{k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in values.items()})


def call(inputs: Inputs, **more: Any) -> LogprobOutput:
    return linear_logprob(**inputs._asdict() | more)


def registered(inputs: Inputs, keep: int = 0) -> tuple[Tensor, ...]:
    """The registered op's logprob, entropy and lse."""
    return torch.ops.prudent.linear_logprob(*inputs, keep)[:3]  # type: ignore[no-any-return]


def leaves_of(inputs: Inputs, frozen: bool = False) -> list[Tensor]:
    """hidden, and unless `frozen` weight and bias if there is one, as leaves that need gradients."""
    given = [inputs.hidden] if frozen else [inputs.hidden, inputs.weight, inputs.bias]
    return [x.detach().requires_grad_() for x in given if x is not None]


def some_grads(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    shape, dtype = inputs.target.shape, inputs.accumulator
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for _ in range(3))  # type: ignore[return-value]


def gradients(
    inputs: Inputs, grads: tuple[Tensor | None, ...], run: Any = call, frozen: bool = False
) -> tuple[Tensor, ...]:
    """Of hidden, and unless `frozen` of weight and of the bias if there is one."""
    leaves = leaves_of(inputs, frozen)
    outputs = run(inputs._replace(**dict(zip(("hidden", "weight", "bias"), leaves, strict=False))))
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    return torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])


def exact(inputs: Inputs, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Outputs and gradients of the same numbers in fp64, by the reference."""
    wide = inputs._replace(
        hidden=inputs.hidden.detach().double(),
        weight=inputs.weight.detach().double(),
        bias=None if inputs.bias is None else inputs.bias.detach().double(),
    )
    outputs = reference.forward(wide)
    outer = tuple(None if g is None else g.double() for g in grads)
    found = reference.backward(OutputGrads(*outer), wide, None, *outputs[1:], Needs(True, True, True))
    return *outputs, *(g for g in found if g is not None)


def unfused(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The usual composition: a linear layer, its logits in fp32, log_softmax, a gather."""
    logits = F.linear(inputs.hidden, inputs.weight, inputs.bias)
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    logits = logits.to(inputs.accumulator) / inputs.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(-1, inputs.target[..., None]).squeeze(-1), entropy, torch.logsumexp(logits, dim=-1)


def agrees_in_fp64(inputs: Inputs, tolerance: float = 1e-12) -> None:
    grads = some_grads(inputs)
    found = (*call(inputs), *gradients(inputs, grads))
    for ours, theirs in zip(found, exact(inputs, grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 0.6},
    "capped": {"softcap": 1.5},
    "both": {"temperature": 1.7, "softcap": 4.0},
    "biased": {"bias": torch.linspace(-1, 1, V, dtype=torch.float64), "temperature": 0.8, "softcap": 4.0},
    "some ignored": {"ignored": (0, 3, 4, 10)},
    "all kept, none looked for": {"ignore_index": None},
    "ignored token inside the vocabulary": {"ignore_index": 0, "target": torch.arange(T) // 4},
}  # fmt: skip
