"""The best-of-n estimator against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from prudent.rlhf.evaluation import best_of_n as B
from prudent.rlhf.evaluation.best_of_n import powers_of_two


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("largest", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])])
def test_n_goes_in_powers_of_two_up_to_all(largest: int, expected: list[int]) -> None:
    assert powers_of_two(largest) == expected


def test_best_of_n_is_the_mean_over_every_subset():
    proxy, gold = normal(2, 7), normal(2, 7, seed=1)
    curve = B.best_of_n_curve(proxy, gold, range(1, 8))
    for column, n in enumerate(range(1, 8)):
        for prompt in range(2):
            picks = [
                gold[prompt, max(subset, key=lambda i: proxy[prompt, i].item())].item()
                for subset in itertools.combinations(range(7), n)
            ]
            assert curve.gold_per_prompt[prompt, column].item() == pytest.approx(sum(picks) / len(picks))


def test_a_tie_counts_as_broken_at_random():
    proxy, gold = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 1.0]]), normal(1, 6)
    curve = B.best_of_n_curve(proxy, gold, range(1, 7))
    for column, n in enumerate(range(1, 7)):
        total, count = 0.0, 0
        for subset in itertools.combinations(range(6), n):
            best = max(proxy[0, i].item() for i in subset)
            tied = [gold[0, i].item() for i in subset if proxy[0, i] == best]
            total, count = total + sum(tied) / len(tied), count + 1
        assert curve.gold[column].item() == pytest.approx(total / count)


def test_best_of_n_weights_sum_to_1_and_match_exact_binomials_at_large_n():
    for n in (1, 2, 500, 12500, 12600):
        weights = B.best_of_n_weights(12600, n)
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        assert (weights[: n - 1] == 0).all()
        for i in (n, (n + 12600) // 2, 12600):
            exact = math.comb(i - 1, n - 1) / math.comb(12600, n)  # python's big integers
            assert weights[i - 1].item() == pytest.approx(exact, rel=1e-8, abs=1e-300)


def test_the_expected_maximum_of_normal_samples():
    # E max of 2 and of 4 standard normals: 1 / sqrt(pi) and 1.029375
    reward = normal(400, 64)
    curve = B.best_of_n_curve(reward, reward, [1, 2, 4])
    for column, expected in enumerate((0.0, 1 / math.sqrt(math.pi), 1.029375)):
        assert abs(curve.gold[column].item() - expected) < 4 * curve.gold_se[column].item() + 1e-3
    assert curve.proxy_spread == pytest.approx(math.sqrt(63 / 64), rel=0.02)


def test_the_standard_error_is_over_prompts():
    proxy, gold = normal(9, 5), normal(9, 5, seed=1)
    curve = B.best_of_n_curve(proxy, gold, [1, 5])
    expected = gold.mean(1).std().item() / 3
    assert curve.gold_se[0].item() == pytest.approx(expected)
    assert B.best_of_n_curve(proxy[:1], gold[:1], [1]).gold_se.isnan().all()


def test_the_kl_of_best_of_n():
    assert B.bon_kl(1) == 0
    assert B.bon_kl(12500) == pytest.approx(8.43356, abs=1e-5)
    assert B.best_of_n_curve(normal(2, 4), normal(2, 4), [1, 4]).kl[1].item() == pytest.approx(math.log(4) - 0.75)


@pytest.mark.parametrize(
    ("proxy", "gold", "ns", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), [1], "one shape"),
        (torch.zeros(3), torch.zeros(3), [1], "one shape"),
        (torch.zeros(0, 3), torch.zeros(0, 3), [1], "one shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [4], "from 1 to 3"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [0], "from 1 to 3"),
        (torch.tensor([[1.0, math.nan]]), torch.zeros(1, 2), [1], "proxy: expected finite rewards, got 1"),
        (torch.zeros(1, 2), torch.tensor([[math.inf, math.inf]]), [1], "gold: expected finite rewards, got 2"),
    ],
)
def test_best_of_n_refuses(proxy, gold, ns, message):
    with pytest.raises(ValueError, match=message):
        B.best_of_n_curve(proxy, gold, ns)


def test_bon_kl_refuses_less_than_one_sample():
    with pytest.raises(ValueError, match="at least 1"):
        B.bon_kl(0)
