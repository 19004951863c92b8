"""`linear_logprob` in plain torch with the whole [T, V] of logits: the oracle. README.md has the maths."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Grads, Inputs, Needs, OutputGrads, Outputs


def _logits(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Capped, tempered logits [T, V], and tanh(raw / softcap), None without a cap."""
    dtype = inputs.accumulator
    raw = inputs.hidden.reshape(-1, inputs.hidden.shape[-1]).to(dtype) @ inputs.weight.to(dtype).T
    if inputs.bias is not None:
        raw = raw + inputs.bias.to(dtype)
    if inputs.softcap is None:
        return raw / inputs.temperature, None
    tanh = torch.tanh(raw / inputs.softcap)
    return inputs.softcap * tanh / inputs.temperature, tanh


def _target(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Targets [T, 1], with 0 for ignored ones, and a mask [T] of targets that are not ignored."""
    target = inputs.target.reshape(-1)
    counts = torch.ones_like(target, dtype=torch.bool)
    if inputs.ignore_index is not None:
        counts = target != inputs.ignore_index
    return torch.where(counts, target, 0)[:, None], counts


def forward(inputs: Inputs, rows: Tensor | None = None) -> Outputs:
    """(logprob, entropy, lse), each of target's shape. The mask comes from the target, not from `rows`."""
    logits, _ = _logits(inputs)
    target, counts = _target(inputs)
    logprobs = torch.log_softmax(logits, dim=1)
    lse = torch.logsumexp(logits, dim=1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=1)
    found = logprobs.gather(1, target).squeeze(1), entropy, lse
    return tuple(torch.where(counts, x, 0).view(inputs.target.shape) for x in found)  # type: ignore[return-value]


def backward(
    grads: OutputGrads, inputs: Inputs, rows: Tensor | None, entropy: Tensor, lse: Tensor, needs: Needs
) -> Grads:
    """(grad_hidden, grad_weight, grad_bias) by the explicit formula; recomputes the forward."""
    need_hidden, need_weight, need_bias = Needs(*needs)
    of_bias = None if inputs.bias is None or not need_bias else inputs.bias.dtype
    logits, tanh = _logits(inputs)
    target, counts = _target(inputs)
    logprobs = torch.log_softmax(logits, dim=1)
    p = logprobs.exp()
    d_logprob, d_entropy, d_lse = (
        torch.zeros_like(counts, dtype=p.dtype) if g is None else torch.where(counts, g.reshape(-1), 0) for g in grads
    )
    plogp = (p * logprobs).sum(dim=1, keepdim=True)
    g = p * ((d_lse - d_logprob)[:, None] - d_entropy[:, None] * (logprobs - plogp))
    g.scatter_add_(1, target, d_logprob[:, None])
    g /= inputs.temperature
    if tanh is not None:
        g *= 1 - tanh.square()
    hidden = inputs.hidden.reshape(-1, inputs.hidden.shape[-1])
    return (
        (g @ inputs.weight.to(g.dtype)).to(hidden.dtype).view(inputs.hidden.shape) if need_hidden else None,
        (g.T @ hidden.to(g.dtype)).to(inputs.weight.dtype) if need_weight else None,
        g.sum(dim=0).to(of_bias) if of_bias is not None else None,
    )
