"""The trainers' formulas, reimplemented from their sources token by token, against the op in fp64.

A comment above each formula names its library, version and function. Results are compared at the unmasked tokens, which
are those that the trainer's losses read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.kernels.advantages import advantage_convention, advantages

GAMMA, LAM, KL_COEF = 0.97, 0.9, 0.2
NAN = float("nan")


def rows(tensor: Tensor) -> list[list[float]]:
    values: list[list[float]] = tensor.tolist()
    return values


# TRL 1.12.0, trl/experimental/ppo/ppo_trainer.py: PPOTrainer.train, steps 4 to 6, and masked_whiten
def trl(
    score: Tensor,
    logprob: Tensor,
    ref_logprob: Tensor,
    value: Tensor,
    mask: Tensor,
    estimator: str,
    whiten_rewards: bool,
) -> tuple[Tensor, Tensor]:
    batch, length = mask.shape
    ends = (mask.sum(1) - 1).tolist()  # sequence_lengths: the index of the last token of a response padded on the right
    p, q, v = rows(logprob), rows(ref_logprob), rows(value)
    reward = [[0.0] * length for _ in range(batch)]
    for b in range(batch):
        for t in range(ends[b] + 1):
            logr = q[b][t] - p[b][t]
            kl = -logr if estimator == "k1" else (math.exp(logr) - 1) - logr
            reward[b][t] = -KL_COEF * kl
        reward[b][ends[b] + 1 if ends[b] + 1 < length else ends[b]] += float(score[b])
    if whiten_rewards:
        inside = [[t <= ends[b] + 1 for t in range(length)] for b in range(batch)]  # ~padding_mask_p1
        reward = trl_whiten(reward, inside, shift_mean=False)
    advantage = [[0.0] * length for _ in range(batch)]
    returns = [[0.0] * length for _ in range(batch)]
    for b in range(batch):
        worth = [v[b][t] if t <= ends[b] + 1 else 0.0 for t in range(length)]
        last = 0.0
        for t in reversed(range(length)):
            following = worth[t + 1] if t < length - 1 else 0.0
            delta = reward[b][t] + GAMMA * following - worth[t]
            last = delta + GAMMA * LAM * last
            advantage[b][t] = last
            returns[b][t] = last + worth[t]
    advantage = trl_whiten(advantage, mask.tolist(), shift_mean=True)
    return torch.tensor(advantage, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64)


def trl_whiten(values: list[list[float]], mask: list[list[bool]], shift_mean: bool) -> list[list[float]]:
    taken = [x for row, keep in zip(values, mask, strict=True) for x, k in zip(row, keep, strict=True) if k]
    n = len(taken)
    mean = sum(taken) / n
    variance = sum((x - mean) ** 2 for x in taken) / n * n / (n - 1)
    out = [[(x - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean) for x in row] for row in values]
    return [[x if k else 0.0 for x, k in zip(row, keep, strict=True)] for row, keep in zip(out, mask, strict=True)]


# OpenRLHF 0.11.2, openrlhf/models/utils.py: compute_approx_kl, compute_reward; openrlhf/trainer/ppo_utils/
# experience_maker.py: compute_advantages_and_returns, get_advantages_and_returns, get_cumulative_returns
def openrlhf(
    score: Tensor,
    logprob: Tensor,
    ref_logprob: Tensor,
    value: Tensor | None,
    mask: Tensor,
    estimator: str,
    std_norm: bool,
) -> tuple[Tensor, Tensor]:
    batch, length = mask.shape
    reward, worth = torch.zeros(batch, length).double(), torch.zeros(batch, length).double()
    for b in range(batch):
        end = max(t for t in range(length) if mask[b, t])
        for t in range(length):
            if mask[b, t]:
                ratio = float(logprob[b, t] - ref_logprob[b, t])
                kl = {"k1": ratio, "k2": ratio**2 / 2, "k3": math.exp(-max(ratio, -10.0)) - 1 + max(ratio, -10.0)}
                reward[b, t] = -KL_COEF * min(max(kl[estimator], -10.0), 10.0) + (float(score[b]) if t == end else 0)
                worth[b, t] = 0 if value is None else value[b, t]
    advantage = torch.zeros_like(reward)
    for b in range(batch):
        last = following = 0.0
        for t in reversed(range(length)):
            if value is None:
                last = float(reward[b, t]) + GAMMA * last
            else:
                last = float(reward[b, t]) + GAMMA * following - float(worth[b, t]) + GAMMA * LAM * last
            following = float(worth[b, t])
            advantage[b, t] = last
    returns = advantage + worth
    actions = mask.sum()
    mean = (advantage * mask).sum() / actions
    variance = ((advantage - mean) ** 2 * mask).sum() / actions
    return (advantage - mean) * (variance.clamp(min=1e-8).rsqrt() if std_norm else 1), returns


# verl 0.9.1, verl/trainer/ppo/core_algos.py: kl_penalty, compute_gae_advantage_return,
# compute_reinforce_plus_plus_outcome_advantage; ray_trainer.py: apply_kl_penalty; utils/torch_functional.py:
# masked_whiten. The score comes at the response's last token (workers/reward_manager/naive.py).
def verl(
    score: Tensor, logprob: Tensor, ref_logprob: Tensor, value: Tensor | None, mask: Tensor, estimator: str
) -> tuple[Tensor, Tensor]:
    batch, length = mask.shape
    advantage, returns = torch.zeros(batch, length).double(), torch.zeros(batch, length).double()
    for b in range(batch):
        end = max(t for t in range(length) if mask[b, t])
        last = following = 0.0
        for t in reversed(range(length)):
            if not mask[b, t]:
                continue  # verl: what is carried passes masked tokens unchanged
            d = float(ref_logprob[b, t] - logprob[b, t])
            low_variance = math.exp(min(max(d, -20), 20)) - min(max(d, -20), 20) - 1
            kl = {"k1": -d, "abs": abs(d), "k2": 0.5 * d * d, "k3": min(max(low_variance, -10), 10)}[estimator]
            reward = (float(score[b]) if t == end else 0.0) - KL_COEF * kl
            if value is None:
                last = reward + GAMMA * last
                returns[b, t] = last
            else:
                last = reward + GAMMA * following - float(value[b, t]) + GAMMA * LAM * last
                following = float(value[b, t])
                returns[b, t] = last + following
            advantage[b, t] = last
    n = mask.sum()
    mean = (advantage * mask).sum() / (n + 1e-8)
    variance = ((advantage - mean) ** 2 * mask).sum() / (n + 1e-8) * n / (n - 1)
    return (advantage - mean) * (variance + 1e-8).rsqrt(), returns


def run(batch: tuple[Tensor, ...], **changes: Any) -> Any:
    return advantages(*batch, **{"gamma": GAMMA, "lam": LAM, "kl_coef": KL_COEF, **changes})


def same(ours: Tensor, theirs: Tensor, mask: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[~mask], torch.zeros_like(ours[~mask]))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("kind", ["right", "full"])
def test_trl(make_batch: Callable[..., Any], kind: str, estimator: str) -> None:
    batch = make_batch(kind, value_after=True)
    mask = batch[4]
    ours = run(batch, **advantage_convention("trl", estimator))
    advantage, returns = trl(*batch, estimator, whiten_rewards=False)
    same(ours.advantage, advantage, mask)
    with_end = mask.clone()  # ~padding_mask_p1, over which TRL takes the value loss
    with_end[:, 1:] |= mask[:, :-1]
    same(ours.returns, returns, with_end)


def test_trl_with_whitened_rewards_is_two_calls(make_batch: Callable[..., Any]) -> None:
    batch = make_batch("right", value_after=True)
    convention = advantage_convention("trl")
    mask = batch[4]
    reward = run(batch, **{**convention, "whiten": "none"}).reward
    with_end = mask.clone()
    with_end[:, 1:] |= mask[:, :-1]
    taken = reward[with_end]
    whitened = (reward - taken.mean()) * (taken.var() + 1e-8).rsqrt() + taken.mean()
    ours = run((whitened, None, None, *batch[3:]), **{**convention, "kl_coef": 0.0})
    advantage, returns = trl(*batch, "k1", whiten_rewards=True)
    same(ours.advantage, advantage, mask)
    same(ours.returns, returns, with_end)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kind", ["right", "left", "prompt", "holes"])
def test_openrlhf(make_batch: Callable[..., Any], kind: str, estimator: str) -> None:
    batch = make_batch(kind)
    batch[1][batch[4]] *= 4  # some estimates reach the clip
    ours = run(batch, **advantage_convention("openrlhf", estimator))
    advantage, returns = openrlhf(*batch, estimator, std_norm=True)
    same(ours.advantage, advantage, batch[4])
    same(ours.returns, returns, batch[4])


def test_openrlhf_without_the_division_by_the_std_and_without_a_critic(make_batch: Callable[..., Any]) -> None:
    batch = make_batch("holes")
    convention = advantage_convention("openrlhf")
    centred = run(batch, **{**convention, "whiten": "centre"})
    same(centred.advantage, openrlhf(*batch, "k1", std_norm=False)[0], batch[4])
    reinforce = run((*batch[:3], None, batch[4]), **convention)
    advantage, returns = openrlhf(*batch[:3], None, batch[4], "k1", std_norm=True)
    same(reinforce.advantage, advantage, batch[4])
    same(reinforce.returns, returns, batch[4])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("kind", ["right", "left", "prompt", "holes"])
@pytest.mark.parametrize("critic", [True, False], ids=["gae", "reinforce++"])
def test_verl(make_batch: Callable[..., Any], kind: str, estimator: str, critic: bool) -> None:
    score, logprob, ref_logprob, value, mask = make_batch(kind)
    logprob[mask] *= 4
    batch = (score, logprob, ref_logprob, value if critic else None, mask)
    ours = run(batch, **advantage_convention("verl", estimator))
    advantage, returns = verl(*batch, estimator)
    same(ours.advantage, advantage, mask, 1e-9)  # verl divides by n + 1e-8, n >= 20 here
    same(ours.returns, returns, mask)


def test_trainers_differ_only_in_holes_and_the_end(make_batch: Callable[..., Any]) -> None:
    """Without a hole (masked tokens between unmasked ones), "skip" and "zero" are the same; with a hole they differ."""
    for kind in ("right", "left", "prompt"):
        batch = make_batch(kind)
        assert torch.equal(run(batch, holes="skip").advantage, run(batch, holes="zero").advantage)
    batch = make_batch("holes")
    assert not torch.allclose(run(batch, holes="skip").advantage, run(batch, holes="zero").advantage)


def test_three_tokens_by_hand() -> None:
    """r = 0, 0, 1; V = 1, 2, 3; gamma = lam = 1/2."""
    value, score = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1.0])
    options: dict[str, Any] = {"gamma": 0.5, "lam": 0.5, "kl_coef": 0.0, "whiten": "none"}
    out = advantages(score, None, None, value, torch.ones(1, 3, dtype=torch.bool), **options)
    assert out.advantage.tolist() == [[-0.25, -1.0, -2.0]]
    assert out.returns.tolist() == [[0.75, 1.0, 1.0]]
    hole = torch.tensor([[True, False, True]])
    assert advantages(score, None, None, value, hole, holes="skip", **options).advantage.tolist() == [[0.0, 0, -2.0]]
    assert advantages(score, None, None, value, hole, holes="zero", **options).advantage.tolist() == [[-0.75, 0, -2.0]]
    late = advantages(score, None, None, value, torch.tensor([[True, True, False]]), score_at="after", **options)
    assert late.reward.tolist() == [[0, 0, 1.0]]  # its own value counts against it: 1 - 3 = -2 one step on
    assert late.advantage.tolist() == [[-0.25, -1.0, 0]]
    assert late.returns.tolist() == [[0.75, 1.0, 1.0]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_kl_price_by_hand(estimator: str) -> None:
    d = torch.tensor([[0.5, -1.0, 1e-4, -3.0]], dtype=torch.float64)
    price = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d, "abs": d.abs()}[estimator].clamp(-2, 2)
    zero, mask = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    out = advantages(zero, d, zero, None, mask, kl_coef=0.5, kl_estimator=estimator, kl_clip=2.0)
    torch.testing.assert_close(out.reward, -0.5 * price, rtol=1e-7, atol=1e-15)
    torch.testing.assert_close(out.stats.kl, price.mean(), rtol=1e-12, atol=0)


def test_a_convention_or_estimator_that_a_trainer_has_not_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="trainer: expected one of trl, openrlhf, verl, got 'slime'"):
        advantage_convention("slime")
    with pytest.raises(ValueError, match="kl_estimator: expected one of k1, k3, got 'k2'"):
        advantage_convention("trl", "k2")
