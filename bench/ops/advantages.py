"""Cases of `advantages`: against the same reward shaping, GAE and whitening as a loop over time, as in trainers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.advantages import advantages, reference
from ...kernels.advantages.contract import VARIANCE_EPS, Inputs
from ..case import DTYPES, Case, Check, Work, compare, compiled_variants, generator, num_sets

GAMMA, LAM, KL_COEF = 1.0, 0.95, 0.05
SHAPES = {"smoke": ((4, 8),), "small": ((256, 512),), "full": ((1024, 2048),)}  # [B, T]
_UNROLLED = 16  # steps: torch.compile unrolls the loop, so its compile time grows with T
_OUTPUTS = ("advantage", "returns", "reward")
_OPERATIONS = 15  # per token: KL and its penalty, temporal difference, recurrence, return, moments, whitening


def composed(
    score: Tensor, logprob: Tensor, ref_logprob: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantage, returns, reward) [B, T] in fp32, masked tokens skipped, as in verl's trainer."""
    m = mask.float()
    reward = -KL_COEF * (logprob.float() - ref_logprob.float()) * m
    last = mask.long().sum(dim=1) - 1
    reward[torch.arange(len(reward), device=reward.device), last] += score.float()
    value = value.float() * m
    next_value = next_advantage = torch.zeros_like(reward[:, 0])
    backwards = []
    for t in range(reward.shape[1] - 1, -1, -1):
        now = reward[:, t] + GAMMA * next_value - value[:, t] + GAMMA * LAM * next_advantage
        next_value = value[:, t] * m[:, t] + (1 - m[:, t]) * next_value
        next_advantage = now * m[:, t] + (1 - m[:, t]) * next_advantage
        backwards.append(now)
    advantage = torch.stack(backwards[::-1], dim=1) * m
    returns = advantage + value
    count = m.sum()
    mean = advantage.sum() / count
    variance = ((advantage - mean).square() * m).sum() / (count - 1)
    return (advantage - mean) * torch.rsqrt(variance + VARIANCE_EPS) * m, returns, reward


def fused(
    score: Tensor, logprob: Tensor, ref_logprob: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out = advantages(score, logprob, ref_logprob, value, mask, gamma=GAMMA, lam=LAM, kl_coef=KL_COEF)
    return out.advantage, out.returns, out.reward


def _tensors(batch: int, length: int, dtype: str, g: torch.Generator) -> tuple[Tensor, ...]:
    """Log-probabilities, values and scores of responses of random lengths, padded on the right."""
    new = partial(torch.randn, generator=g, device=g.device)
    logprob = -new(batch, length).abs()
    ref_logprob = logprob + 0.1 * new(batch, length)
    lengths = torch.randint(length // 4, length + 1, (batch, 1), generator=g, device=g.device)
    mask = torch.arange(length, device=g.device) < lengths
    tokens = (t.to(DTYPES[dtype]) for t in (logprob, ref_logprob, new(batch, length)))
    return new(batch), *tokens, mask


def _make(batch: int, length: int, dtype: str, device: torch.device) -> Work:
    sets: list[tuple[Any, ...]] = [
        _tensors(batch, length, dtype, generator(device, seed)) for seed in range(num_sets(device))
    ]
    variants: dict[str, Any] = {"ours": fused, "eager": composed}
    if length > _UNROLLED:
        notes = [f"compiled: left out, torch.compile unrolls the loop over {length} tokens"]
        return Work(sets, variants, lambda: _check(sets[0]), notes=notes)
    return Work(sets, variants | compiled_variants(composed, device), lambda: _check(sets[0]))


@torch.no_grad()
def _check(tensors: tuple[Any, ...]) -> Check:
    score, logprob, ref_logprob, value = (t.double() for t in tensors[:4])
    mask = tensors[4]
    inputs = Inputs(
        score=score,
        logprob=logprob,
        ref_logprob=ref_logprob,
        value=value,
        mask=mask,
        gamma=GAMMA,
        lam=LAM,
        kl_coef=KL_COEF,
        kl_estimator="k1",
        kl_clip=float("inf"),
        holes="skip",
        score_at="last",
        whiten="sample",
    )
    exact = dict(zip(_OUTPUTS, reference.forward(inputs)[:3], strict=True))
    ours, eager = (dict(zip(_OUTPUTS, f(*tensors), strict=True)) for f in (fused, composed))
    return compare(ours, eager, exact)


def cases() -> Iterator[Case]:
    for size, shapes in SHAPES.items():
        for dtype, kind in DTYPES.items():
            for batch, length in shapes:
                tokens = batch * length
                # read: scores, log-probabilities, values, mask; written: three outputs, a flag a sequence, six numbers
                moved = 4 * batch + 3 * kind.itemsize * tokens + tokens + 3 * 4 * tokens + batch + 6 * 4
                make = partial(_make, batch, length, dtype)
                shape = f"{batch} x {length}"
                yield Case("advantages", "GAE, whitened", shape, dtype, size, moved, _OPERATIONS * tokens, make)
