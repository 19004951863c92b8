"""The terms of the loss: values by hand, gradients in closed form, and what stays finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prudent.rlhf.ppo.losses import (
    CHI2_FLOOR,
    chi2_estimate,
    chi2_price,
    kl_estimate,
    policy_loss,
    sequence_sum,
    value_loss,
)


def doubles(*numbers: float, grad: bool = False) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=grad)


def slope(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), at)[0]


def test_at_ratio_1_the_loss_is_minus_the_advantage_and_so_is_its_gradient() -> None:
    logprob, advantage = doubles(-1.0, -2.0, -0.5, grad=True), doubles(2.0, -3.0, 0.0)
    loss, clipped = policy_loss(logprob, logprob.detach(), advantage, 0.2)
    assert torch.equal(loss.detach(), -advantage)
    assert torch.equal(slope(loss, logprob), -advantage)
    assert not clipped.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -2.4, True),  # already gained 20 %: no more of it
        (1.5, -2.0, 3.0, False),  # worse than it was: pulled back
        (0.5, -2.0, 1.6, True),
        (0.5, 2.0, -1.0, False),
        (1.1, 2.0, -2.2, False),
    ],
)
def test_the_clip_takes_the_gradient_only_where_the_policy_went_the_right_way(
    ratio: float, advantage: float, loss: float, clipped: bool
) -> None:
    logprob = doubles(math.log(ratio), grad=True)
    found, where = policy_loss(logprob, doubles(0.0), doubles(advantage), 0.2)
    assert float(found.detach()) == pytest.approx(loss, rel=1e-12)
    assert bool(where) is clipped
    assert float(slope(found, logprob)) == pytest.approx(0.0 if clipped else -advantage * ratio, rel=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
def test_a_ratio_that_would_overflow_leaves_loss_and_gradient_finite(advantage: float, log_ratio: float) -> None:
    logprob = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = policy_loss(logprob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert torch.isfinite(loss)
    assert torch.isfinite(slope(loss, logprob))


@pytest.mark.parametrize(
    ("value", "clip", "loss", "gradient"),
    [
        (2.0, None, 0.5, -1.0),  # target 3, old value 1
        (1.1, 0.2, 1.805, -1.9),  # moved by less than the clip
        (2.0, 0.2, 1.62, 0.0),  # towards the target by more than the clip: the old value + 0.2 counts
        (0.0, 0.2, 4.5, -3.0),  # away from it: the plain error is the larger
    ],
)
def test_the_value_loss_by_hand(value: float, clip: float | None, loss: float, gradient: float) -> None:
    at = doubles(value, grad=True)
    found = value_loss(at, doubles(1.0), doubles(3.0), clip)
    assert float(found.detach()) == pytest.approx(loss, rel=1e-12)
    assert float(slope(found, at)) == pytest.approx(gradient, abs=1e-12)


def test_kl_estimates_by_hand() -> None:
    ratio = doubles(0.5, -2.0)
    expected: dict[Any, list[float]] = {
        "k1": [0.5, -2.0],
        "k2": [0.125, 2.0],
        "k3": [math.exp(-0.5) - 0.5, math.exp(2.0) - 3.0],
        "abs": [0.5, 2.0],
    }
    for estimator, numbers in expected.items():
        assert kl_estimate(ratio, estimator).tolist() == pytest.approx(numbers, rel=1e-12)


def test_k3_keeps_its_digits_near_the_reference() -> None:
    assert float(kl_estimate(torch.tensor([1e-3]), "k3")) == pytest.approx(1e-6 / 2, rel=2e-3)


def test_another_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kl.estimator: expected k1, k2, k3 or abs, got k4$"):
        kl_estimate(doubles(0.0), "k4")  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(st.floats(-9.9, 9.9))
def test_chi2_terms_are_2_cosh_minus_2_within_the_knee(log_ratio: float) -> None:
    expected = 4 * math.sinh(log_ratio / 2) ** 2  # = 2 cosh - 2, with its digits
    assert float(chi2_estimate(doubles(log_ratio))) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_chi2_terms_go_on_straight_beyond_the_knee_and_smoothly() -> None:
    at = doubles(10 - 1e-9, 10.0, 12.0, 1e4, grad=True)
    terms = chi2_estimate(at)
    gradient = slope(terms, at)
    assert torch.isfinite(terms).all()
    assert float(gradient[0]) == pytest.approx(float(gradient[1]), rel=1e-8)
    bound = math.exp(10.0)
    assert float(terms.detach()[2]) == pytest.approx(bound * 3 - 1 + math.expm1(-12.0), rel=1e-12)
    assert gradient[2:].tolist() == pytest.approx([bound - math.exp(-12.0), bound], rel=1e-12)
    mirrored = chi2_estimate(-at.detach())
    assert torch.equal(mirrored, terms.detach())


def test_chi2_price_is_a_square_root_and_its_slope_constant_below_a_floor() -> None:
    root, derivative = chi2_price(0.25)
    assert (root, derivative) == (0.5, 1.0)
    step = 1e-6
    assert derivative == pytest.approx((chi2_price(0.25 + step)[0] - chi2_price(0.25 - step)[0]) / (2 * step), rel=1e-6)
    assert chi2_price(0.0) == (math.sqrt(CHI2_FLOOR), 0.0)


def test_sums_of_sequences_and_their_gradient() -> None:
    tokens = doubles(1.0, 2.0, 4.0, 8.0, grad=True)
    sums = sequence_sum(tokens, torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 0, 1]), 3, 5)
    assert sums.tolist() == [3.0, 0.0, 12.0]
    weight = doubles(1.0, 10.0, 100.0)
    assert slope(sums * weight, tokens).tolist() == [1.0, 1.0, 100.0, 100.0]
