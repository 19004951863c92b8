"""The explicit gradient of reference.py equals autograd of `ensemble_reward` with the losses of rlhf/reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.kernels.ensemble_reward.reference import philox_normal
from prudent.kernels.preference_step import reference

from .cases import LOSSES, composed, equal, make

SHAPES: dict[str, dict[str, Any]] = {
    "odd": {},
    "gathered with repeats": {"pairs": 20, "gathered": True},
    "one pair, one head, one feature": {"pairs": 1, "k": 1, "d": 1},
    "one head": {"k": 1},
    "more heads than pairs": {"pairs": 3, "k": 9},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_the_composed_forms_in_fp64(name: str, shape: str) -> None:
    inputs = make(LOSSES[name], **SHAPES[shape])
    equal(reference.step(inputs), composed(inputs), 1e-11)


def test_bradley_terry_leaves_the_stds_alone_and_treats_all_heads_alike() -> None:
    inputs = make(LOSSES["bt-all"])
    _, dweight, dbias, _, std = reference.step(inputs)
    k = inputs.num_heads
    assert not dweight[k:].any()
    assert not dbias[k:].any()
    assert torch.equal(dweight[:k], dweight[:1].expand(k, -1))
    assert std.item() == 0


@pytest.mark.parametrize("name", ["closed", "sampled"])
def test_eq_8_reaches_the_own_head_alone(name: str) -> None:
    inputs = make(LOSSES[name])
    inputs = inputs._replace(head_id=torch.full_like(inputs.head_id, 3))  # type: ignore[arg-type]
    _, dweight, dbias, _, _ = reference.step(inputs)
    others = [j for j in range(2 * inputs.num_heads) if j % inputs.num_heads != 3]
    assert not dweight[others].any()
    assert not dbias[others].any()
    assert dweight[3].any()
    assert dweight[inputs.num_heads + 3].any()


def test_the_closed_form_is_the_sampled_ones_expectation() -> None:
    inputs = make(LOSSES["sampled"], pairs=2, d=3, k=1)
    draws = [reference.step(inputs._replace(seed=torch.tensor([seed]))) for seed in range(4000)]
    closed = reference.step(inputs._replace(seed=None))
    for part in range(3):
        values = torch.stack([draw[part] for draw in draws])
        spread = values.std(dim=0) / len(draws) ** 0.5
        assert ((values.mean(dim=0) - closed[part]).abs() <= 5 * spread + 1e-9).all()


def test_the_noise_is_that_of_ensemble_reward() -> None:
    """With p_hat 1/2 the target is 0: the loss is the sum of the own heads' squared samples, over the pairs."""
    inputs = make(LOSSES["sampled"])
    assert inputs.seed is not None
    assert inputs.head_id is not None
    inputs = inputs._replace(p_hat=torch.full_like(inputs.p_hat, 0.5))  # type: ignore[arg-type]
    k, n = inputs.num_heads, inputs.num_rows
    z = inputs.features @ inputs.weight.T + inputs.bias
    std = torch.nn.functional.softplus(z[:, k:]) + inputs.std_floor
    samples = z[:, :k] + std * philox_normal(inputs.seed, n, k, torch.float64)
    own = samples.gather(1, inputs.head_id.repeat(2)[:, None])
    torch.testing.assert_close(reference.step(inputs)[0], own.square().sum() / inputs.num_pairs)


def test_accuracy_counts_strict_wins_and_std_is_the_own_heads() -> None:
    inputs = make(LOSSES["closed"], pairs=4, d=1, k=2)
    inputs = inputs._replace(
        features=torch.tensor([[1.0], [2], [3], [4], [0], [2], [4], [3]], dtype=torch.float64),
        weight=torch.tensor([[1.0], [-1], [0], [0]], dtype=torch.float64),
        bias=torch.zeros(4, dtype=torch.float64),
        head_id=torch.tensor([0, 0, 0, 1]),
    )
    _, _, _, accuracy, std = reference.step(inputs)
    assert accuracy.item() == 0.25  # a win, a tie, a loss, and a loss under the negative head
    torch.testing.assert_close(std.item(), torch.tensor(2.0).log().item() + inputs.std_floor)


def test_a_gap_beyond_softpluss_threshold_has_slope_one_as_in_torch() -> None:
    inputs = make(LOSSES["bt"], pairs=3)
    inputs = inputs._replace(features=30 * inputs.features)
    equal(reference.step(inputs), composed(inputs), 1e-11)


def test_standardised_features_are_folded_into_the_head_and_their_gradient_unfolded() -> None:
    """README.md's recipe: the head of scaled features, trained from raw ones."""
    inputs = make(LOSSES["closed-all"])
    shift, inverse = inputs.features.mean(dim=0), 1 / inputs.features.std(dim=0)
    expected = reference.step(inputs._replace(features=(inputs.features - shift) * inverse))
    folded = inputs.weight * inverse
    loss, dweight, dbias, *_ = reference.step(inputs._replace(weight=folded, bias=inputs.bias - folded @ shift))
    unfolded = (dweight - dbias[:, None] * shift) * inverse
    equal((loss, unfolded, dbias), expected, 1e-11)
