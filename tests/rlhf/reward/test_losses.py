"""Losses against hand-written fp64 formulas, closed forms and gradcheck."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from prudent.rlhf.reward.losses import bradley_terry, brme, bsr, partition


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_bradley_terry_is_the_mean_of_minus_log_sigmoid() -> None:
    chosen, rejected, margin = _random(7), _random(7, seed=1), _random(7, seed=2)
    plain = sum(-math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen, rejected, strict=True)) / 7
    shifted = (
        sum(-math.log(1 / (1 + math.exp(-(c - r - m)))) for c, r, m in zip(chosen, rejected, margin, strict=True)) / 7
    )
    assert bradley_terry(chosen, rejected).item() == pytest.approx(plain, rel=1e-14)
    assert bradley_terry(chosen, rejected, margin).item() == pytest.approx(shifted, rel=1e-14)


def test_bradley_terry_stays_finite_where_the_sigmoid_underflows() -> None:
    far = torch.tensor([-2000.0, 2000.0])
    assert bradley_terry(far, torch.zeros(2)).item() == 1000.0


def _eq8(mean: Tensor, std: Tensor, p_hat: Tensor, head: Tensor, alpha: float, noise: Tensor) -> float:
    """Eq. 8 as the paper prints it, pair by pair."""
    pairs, total = len(p_hat), 0.0
    for i in range(pairs):
        k = int(head[i])
        plus = mean[i, k] + noise[i, k] * std[i, k]
        minus = mean[pairs + i, k] + noise[pairs + i, k] * std[pairs + i, k]
        p = p_hat[i]
        total += float((plus - alpha * (p - 0.5)) ** 2 + (minus - alpha * ((1 - p) - 0.5)) ** 2)
    return total / pairs


def _case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _random(12, 3), _random(12, 3, seed=1).exp(), torch.sigmoid(_random(6, seed=2)), torch.arange(6) % 3


def test_sampled_brme_is_equation_8() -> None:
    mean, std, p_hat, head = _case()
    noise = _random(12, 3, seed=5)
    expected = _eq8(mean, std, p_hat, head, 3.0, noise)
    assert brme(mean, std, p_hat, head, 3.0, noise).item() == pytest.approx(expected, rel=1e-13)


def test_the_closed_form_is_the_expectation_of_the_sampled_loss() -> None:
    mean, std, p_hat, head = _case()
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # exact: the loss is of degree 2 in the noise
    average = sum(
        w / math.sqrt(2 * math.pi) * brme(mean, std, p_hat, head, 2.0, torch.full((12, 3), x, dtype=torch.float64))
        for x, w in zip(nodes.tolist(), weights.tolist(), strict=True)
    )
    assert brme(mean, std, p_hat, head, 2.0).item() == pytest.approx(float(average), rel=1e-13)


@pytest.mark.parametrize("sampled", [False, True])
def test_brme_gradients_are_right_and_reach_only_the_assigned_head(sampled: bool) -> None:
    mean, std, p_hat, head = _case()
    noise = _random(12, 3, seed=5) if sampled else None
    mean.requires_grad_()
    std.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: brme(m, s, p_hat, head, 2.0, noise), (mean, std))
    brme(mean, std, p_hat, head, 2.0, noise).backward()
    own = torch.nn.functional.one_hot(torch.cat([head, head]), 3).bool()
    for leaf in (mean, std):
        assert leaf.grad is not None
        assert (leaf.grad[~own] == 0).all()
        assert (leaf.grad[own] != 0).all()


def test_brme_pulls_std_down_whatever_the_residual() -> None:
    mean, std, p_hat, head = _case()
    std.requires_grad_()
    brme(mean, std, p_hat, head, 2.0).backward()
    assert std.grad is not None
    own = torch.nn.functional.one_hot(torch.cat([head, head]), 3).bool()
    torch.testing.assert_close(std.grad[own], (2 * std.detach() / 6)[own])


def test_brme_is_least_where_means_hit_the_targets_and_std_is_zero() -> None:
    p_hat = torch.tensor([0.9, 0.2], dtype=torch.float64)
    mean = torch.tensor([[0.8], [-0.6], [-0.8], [0.6]], dtype=torch.float64)
    assert brme(mean, torch.zeros(4, 1).double(), p_hat, torch.zeros(2, dtype=torch.int64), 2.0).item() < 1e-30


def test_bsr_equals_lambda_b_times_the_squared_mean() -> None:
    rewards = _random(10).requires_grad_()
    penalty = bsr(rewards.sum(), 5, 0.1)
    assert penalty.item() == pytest.approx(0.1 * 5 * rewards.mean().item() ** 2, rel=1e-13)
    penalty.backward()
    assert rewards.grad is not None
    torch.testing.assert_close(rewards.grad, torch.full_like(rewards, 0.1 * rewards.mean().item()))


@pytest.mark.parametrize(("pairs", "heads"), [(1, 1), (5, 5), (17, 5), (1000, 7)])
def test_the_partition_is_seeded_and_balanced_to_within_one(pairs: int, heads: int) -> None:
    assigned = partition(pairs, heads, 3)
    counts = torch.bincount(assigned, minlength=heads)
    assert counts.sum() == pairs
    assert counts.max() - counts.min() <= 1
    assert torch.equal(assigned, partition(pairs, heads, 3))


def test_another_seed_is_another_partition() -> None:
    assert not torch.equal(partition(100, 5, 0), partition(100, 5, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bradley_terry(torch.zeros(0), torch.zeros(0)), r"chosen: expected shape \[P\] with P > 0, got \[0\]"),
        (lambda: bradley_terry(torch.zeros(2), torch.zeros(3)), r"rejected: expected shape \[2\], got \[3\]"),
        (lambda: bradley_terry(torch.zeros(2), torch.zeros(2), torch.zeros(1)), r"margin: expected shape \[2\]"),
        (lambda: _brme(mean=torch.zeros(3, 2)), r"mean: expected shape \[2P, K\], got \[3, 2\]"),
        (lambda: _brme(std=torch.ones(4, 3)), r"std: expected shape \[4, 2\], got \[4, 3\]"),
        (lambda: _brme(p_hat=torch.zeros(4)), r"p_hat: expected shape \[2\], got \[4\]"),
        (lambda: _brme(head=torch.zeros(1, dtype=torch.int64)), r"head: expected shape \[2\], got \[1\]"),
        (lambda: _brme(noise=torch.zeros(2, 2)), r"noise: expected shape \[4, 2\]"),
        (lambda: bsr(torch.zeros(3), 1, 0.1), "reward_sum: expected a scalar"),
        (lambda: bsr(torch.zeros(()), 0, 0.1), "num_pairs: expected a number above 0"),
        (lambda: partition(0, 1, 0), "pairs: expected at least one pair"),
        (lambda: partition(3, 4, 0), r"num_heads: expected at most the number of pairs \(3\), got 4"),
    ],
)
def test_wrong_shapes_are_refused_by_name(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def _brme(**changed: Tensor) -> Tensor:
    given = {
        "mean": torch.zeros(4, 2),
        "std": torch.ones(4, 2),
        "p_hat": torch.full((2,), 0.5),
        "head": torch.zeros(2, dtype=torch.int64),
    }
    return brme(**{**given, **changed}, alpha=1.0)
