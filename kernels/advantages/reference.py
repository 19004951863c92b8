"""`advantages` in plain torch, written like the formulas: the oracle, and the execution on a CPU without `_C.so`.

The loop over time handles the whole batch at once. It carries the next value and the next advantage separately, as the
trainers do; the other executions fold both into one affine recurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import VARIANCE_EPS, Inputs, Outputs


def kl_estimate(logprob: Tensor, ref_logprob: Tensor, estimator: str, clip: float) -> Tensor:
    """Per-token estimates of KL(policy || reference) from log-probabilities of its samples, any shape.

    k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d with d = logprob - ref_logprob (Schulman, "Approximating KL divergence",
    2020), abs = |d|; then clipped to [-clip, clip].
    """
    d = logprob - ref_logprob
    if estimator == "k2":
        d = d.square() / 2
    elif estimator == "abs":
        d = d.abs()
    elif estimator == "k3":
        # beyond 50, e^-d alone is the result, even in fp64; the clamp avoids inf - inf
        d = torch.expm1(-d) - (-d).clamp(max=50)
    return d.clamp(-clip, clip)


def forward(inputs: Inputs) -> Outputs:
    """(advantage, returns, reward [B, T], dropped [B], stats [6]), computed in the output's dtype.

    Statistics and whitening are in fp64, as in the other executions: the square of 1e20 overflows fp32.
    """
    mask, dtype = inputs.mask, inputs.output_dtype
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, -1).amax(1)
    score_step = last
    if inputs.score_at == "after":
        score_step = torch.where((last >= 0) & (last + 1 < mask.shape[1]), last + 1, last)
    at_score = position == score_step[:, None]
    step = mask | at_score

    score = inputs.score.to(dtype)
    reward = torch.where(at_score, score[:, None], zero) if score.dim() == 1 else torch.where(step, score, zero)
    kl = torch.zeros_like(reward)
    if inputs.logprob is not None and inputs.ref_logprob is not None:
        logprob, ref_logprob = (torch.where(mask, t.to(dtype), zero) for t in (inputs.logprob, inputs.ref_logprob))
        kl = kl_estimate(logprob, ref_logprob, inputs.kl_estimator, inputs.kl_clip)
        reward = reward - inputs.kl_coef * kl
    value = torch.zeros_like(reward) if inputs.value is None else torch.where(step, inputs.value.to(dtype), zero)

    advantage = _gae(reward, value, step, inputs)
    dropped = (mask & ~advantage.isfinite()).any(1)
    kept = mask & ~dropped[:, None]
    returns = torch.where(step & ~dropped[:, None], advantage + value, zero)
    reward = torch.where(dropped[:, None], zero, reward)
    stats = _stats(torch.where(kept, advantage, zero), torch.where(kept, kl, zero), kept, dropped, inputs)
    advantage = torch.where(kept, _whitened(advantage.double(), stats, inputs.whiten).to(dtype), zero)
    return advantage, returns, reward, dropped, stats.to(dtype)


def _gae(reward: Tensor, value: Tensor, step: Tensor, inputs: Inputs) -> Tensor:
    """A_t = r_t + gamma V_next - V_t + gamma lam A_next (Schulman et al. 2016, eq. 16), [B, T]."""
    gamma, lam = inputs.gamma, inputs.effective_lam
    next_value = next_advantage = torch.zeros_like(reward[:, 0])
    backwards = []
    for t in reversed(range(reward.shape[1])):
        now = reward[:, t] + gamma * next_value - value[:, t] + gamma * lam * next_advantage
        backwards.append(now)
        if inputs.holes == "skip":
            next_value = torch.where(step[:, t], value[:, t], next_value)
            next_advantage = torch.where(step[:, t], now, next_advantage)
        else:
            next_value, next_advantage = value[:, t], now
    return torch.stack(backwards[::-1], dim=1)


def _stats(advantage: Tensor, kl: Tensor, kept: Tensor, dropped: Tensor, inputs: Inputs) -> Tensor:
    """[6] fp64, in AdvantageStats' order, from advantages and KL that are 0 where not kept."""
    advantage, kl, tokens = advantage.double(), kl.double(), kept.sum().double()
    some = tokens.clamp(min=1)
    mean = advantage.sum() / some
    squares = torch.where(kept, advantage - mean, torch.zeros_like(mean)).square().sum()
    ddof = 0 if inputs.whiten == "population" else 1
    std = (squares / (tokens - ddof).clamp(min=1)).sqrt()
    return torch.stack([tokens, kept.any(1).sum().to(tokens), dropped.sum().to(tokens), mean, std, kl.sum() / some])


def _whitened(advantage: Tensor, stats: Tensor, whiten: str) -> Tensor:
    mean, variance = stats[3], stats[4].square()
    if whiten == "none":
        return advantage
    if whiten == "centre":
        return advantage - mean
    if whiten == "sample":
        return (advantage - mean) * (variance + VARIANCE_EPS).rsqrt()
    return (advantage - mean) * variance.clamp(min=VARIANCE_EPS).rsqrt()
