"""Rewards of a step's samples by heads: sampled by number, compared over the whole step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.engine import EnsembleHead
from prudent.kernels import aggregate, philox_normal
from prudent.rlhf.ppo.rewards.heads import judge

ROWS, WIDTH, HEADS = 6, 8, 3


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def make(aggregation: str) -> EnsembleHead:
    head = EnsembleHead(WIDTH, HEADS, aggregation=aggregation)
    head.reset_parameters(torch.Generator().manual_seed(1))
    return head.requires_grad_(False)


@pytest.mark.parametrize("aggregation", ["tradeoff:0.4", "min", "lcb:1", "nominal", "batch_worst"])
def test_with_a_seed_every_head_is_sampled_by_the_number_of_its_row(features: torch.Tensor, aggregation: str) -> None:
    head = make(aggregation)
    means, sampled = judge(head, features), judge(head, features, 7 << 32)
    values = means.mean + means.std * philox_normal(torch.tensor([7 << 32]), ROWS, HEADS)
    torch.testing.assert_close(sampled.reward, aggregate(means.mean, means.std, values, head.aggregation))
    assert torch.equal(sampled.reward, means.reward) == (aggregation == "nominal")  # which is a mean
    for name in ("nominal", "worst", "mean", "std"):  # what is watched has no noise
        assert torch.equal(getattr(sampled, name), getattr(means, name))
    assert torch.equal(sampled.reward, judge(head, features, 7 << 32).reward)
    other = judge(head, features, (7 << 32) + 1).reward  # the next step
    assert bool((other != sampled.reward).all()) == (aggregation != "nominal")


def test_source_mean_takes_the_means_whatever_the_seed(features: torch.Tensor) -> None:
    head = make("tradeoff:0.4,source=mean")
    assert torch.equal(judge(head, features, 3).reward, judge(head, features).reward)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("aggregation", ["min", "batch_worst", "tradeoff:0.4,worst=batch"])
def test_a_row_that_cannot_be_read_is_nan_and_spoils_no_other(
    features: torch.Tensor, aggregation: str, seed: Any
) -> None:
    head = make(aggregation)
    features[2, 3] = float("nan")
    found = judge(head, features, seed)
    assert found.reward.isnan().tolist() == [i == 2 for i in range(ROWS)]
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found.reward[others], judge(head, features[others], seed).reward)
    assert judge(head, features.fill_(float("inf")), seed).reward.isnan().all()


def test_one_head_has_no_nominal_and_no_worst(features: torch.Tensor) -> None:
    found = judge(EnsembleHead(WIDTH, 1, aggregation="mean"), features)
    assert (found.nominal, found.worst) == (None, None)
    assert torch.equal(found.reward, found.mean[:, 0])
