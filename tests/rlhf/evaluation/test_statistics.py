"""The measures against closed forms: enumeration, known distributions, and degenerate inputs that give None."""

from __future__ import annotations

import math
import statistics as python_statistics

import pytest
import torch

from prudent.rlhf.evaluation import statistics as S


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_tie_is_wrong():
    assert S.pair_correct(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])).tolist() == [True, False, False]


def test_the_interval_of_independent_rows_is_the_binomial_one():
    correct = torch.zeros(2000, dtype=torch.bool)
    correct[:1400] = True
    interval = S.mean_interval(correct, resamples=2000)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 2000)
    assert interval.value == pytest.approx(0.7)
    assert interval.low == pytest.approx(0.7 - half, abs=0.002)
    assert interval.high == pytest.approx(0.7 + half, abs=0.002)


def test_resampling_prompts_widens_the_interval_by_the_root_of_the_cluster_size():
    # 100 prompts of 16 identical rows carry the information of 100 rows
    prompt = torch.arange(100).repeat_interleave(16)
    correct = (normal(100) > -0.5).repeat_interleave(16)
    rows = S.mean_interval(correct, resamples=2000)
    prompts = S.mean_interval(correct, prompt, resamples=2000)
    assert (prompts.high - prompts.low) / (rows.high - rows.low) == pytest.approx(4.0, rel=0.15)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    covered = 0
    for seed in range(200):
        interval = S.mean_interval(normal(80, seed=seed), resamples=300, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 180 <= covered <= 198  # binomial(200, .95): mean 190, four standard deviations 12


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = normal(300)
    assert S.mean_interval(values, seed=3) == S.mean_interval(values, seed=3)
    assert S.mean_interval(values, seed=3) != S.mean_interval(values, seed=4)


def test_one_prompt_has_a_value_but_no_interval_and_no_rows_have_neither():
    assert S.mean_interval(torch.ones(5), torch.zeros(5, dtype=torch.int64)) == (1.0, None, None)
    assert S.mean_interval(torch.ones(0)) == (None, None, None)


def test_the_paired_difference_is_tighter_than_two_intervals_say():
    truth = normal(3000)
    first = (truth + 0.10 * normal(3000, seed=1), torch.zeros(3000))
    second = (truth + 0.10 * normal(3000, seed=2), torch.zeros(3000))
    gap = S.accuracy_difference(first, second, resamples=500)
    alone = S.pair_accuracy(*first, resamples=500)
    assert gap.value == pytest.approx(S.pair_accuracy(*first).value - S.pair_accuracy(*second).value)
    assert gap.high - gap.low < 0.6 * (alone.high - alone.low)
    assert S.accuracy_difference(first, first) == (0.0, 0.0, 0.0)


def test_group_labels_number_keys_by_first_appearance():
    assert S.group_labels(["b", "a", "b", ("x", 1)]).tolist() == [0, 1, 0, 2]


def test_standardise_gives_mean_0_and_population_std_1_in_every_source():
    values, sources = normal(60, 3) * 7 + 5, torch.arange(60) % 2
    z = S.standardise(values, sources)
    for source in (0, 1):
        torch.testing.assert_close(z[sources == source].mean(0), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(z[sources == source].std(0, correction=0), torch.ones(3, dtype=torch.float64))


def test_a_constant_source_standardises_to_0():
    assert S.standardise(torch.full((1001,), 0.1)).abs().max() == 0
    assert S.standardise(torch.full((1001,), 1e9) / 3).abs().max() == 0


def test_the_normalised_margin_ignores_the_rewards_unit_and_offset():
    c, r = normal(50, seed=1) + 0.5, normal(50, seed=2)
    torch.testing.assert_close(S.normalised_margin(40 * c - 7, 40 * r - 7), S.normalised_margin(c, r))
    both = torch.cat([c, r])
    torch.testing.assert_close(S.normalised_margin(c, r), (c - r) / both.std(correction=0))


def test_the_ellipse_area_of_a_known_covariance():
    # columns with covariance exactly [[4, 1.2], [1.2, 1]]: det = 2.56
    base = normal(500, 2)
    base = base - base.mean(0)
    white = base @ torch.linalg.inv(torch.linalg.cholesky(base.T @ base / 500)).T
    x, y = 2 * white[:, 0], 0.6 * white[:, 0] + 0.8 * white[:, 1]
    assert S.ellipse_area(x, y) == pytest.approx(math.pi * 1.6)
    assert S.ellipse_area(x, 3 * x + 1) == pytest.approx(0, abs=1e-6)


def test_the_normalised_area_has_no_unit_and_is_pi_for_sides_that_are_unrelated():
    x, y = normal(20000), normal(20000, seed=1)
    assert S.normalised_area(x, y) == pytest.approx(math.pi, rel=0.03)
    assert S.normalised_area(50 * x + 3, 50 * y + 3) == pytest.approx(S.normalised_area(x, y))
    pooled = torch.cat([x, x + y]).var(correction=0).item()
    assert S.normalised_area(x, x + y) == pytest.approx(S.ellipse_area(x, x + y) / pooled)
    assert S.normalised_area(torch.full((7,), 0.1), torch.full((7,), 0.1)) == 0


def test_rank_correlation_of_monotone_reversed_and_constant_data():
    x = normal(40)
    assert S.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert S.rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert S.rank_correlation(x, torch.ones(40)) is None
    assert S.rank_correlation(x[:1], x[:1]) is None


def test_rank_correlation_shares_the_mean_rank_of_a_tie():
    x, y = torch.tensor([10.0, 30.0, 10.0, 20.0]), torch.tensor([2.0, 1.0, 1.0, 3.0])
    expected = python_statistics.correlation([1.5, 4.0, 1.5, 3.0], [3.0, 1.5, 1.5, 4.0])
    assert S.rank_correlation(x, y) == pytest.approx(expected)


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.1611), (10, 0.2993, 0.7007), (20, 0.8389, 1.0)])
def test_the_interval_of_a_share_is_wilsons(hits: int, low: float, high: float) -> None:
    assert S.share_interval(hits, 20) == pytest.approx((hits / 20, low, high), abs=2e-4)


def test_auroc_is_the_share_of_ordered_pairs_with_ties_a_half():
    signal, positive = normal(60).round(decimals=1), normal(60, seed=1) > 0
    pairs = [(p > n) + 0.5 * (p == n) for p in signal[positive].tolist() for n in signal[~positive].tolist()]
    assert S.auroc(signal, positive).item() == pytest.approx(sum(pairs) / len(pairs))


def test_auroc_with_whole_weights_is_auroc_of_repeated_rows():
    signal, positive = normal(20).round(decimals=1), torch.arange(20) % 3 == 0
    weights = torch.arange(20) % 4
    repeated = torch.arange(20).repeat_interleave(weights)
    expected = S.auroc(signal[repeated], positive[repeated])
    torch.testing.assert_close(S.auroc(signal, positive, weights[None].double()), expected)


def test_auroc_of_one_class_is_none_and_of_a_constant_signal_a_half():
    assert S.auroc_interval(normal(10), torch.ones(10, dtype=torch.bool)) == (None, None, None)
    assert S.auroc(torch.ones(10), torch.arange(10) < 4).item() == 0.5
    assert S.auroc_interval(torch.ones(0), torch.ones(0, dtype=torch.bool)) == (None, None, None)


def test_the_auroc_interval_has_the_width_of_hanley_and_mcneil():
    signal, positive = normal(800), torch.arange(800) % 2 == 0
    signal = signal + positive * 0.8
    interval = S.auroc_interval(signal, positive, resamples=1000)
    a = interval.value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    se = math.sqrt((a * (1 - a) + 399 * (q1 - a * a) + 399 * (q2 - a * a)) / 400**2)
    assert interval.low < a < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * se, rel=0.15)


def test_reliability_bins_hold_equal_counts_and_their_own_accuracy():
    signal = torch.arange(100.0)
    bins = S.reliability(signal, signal < 50, bins=4)
    assert [b.size for b in bins] == [25, 25, 25, 25]
    assert [b.accuracy.value for b in bins] == [1.0, 1.0, 0.0, 0.0]
    assert (bins[1].low, bins[1].median, bins[1].high) == (25.0, 37.0, 49.0)


def test_reliability_keeps_equal_signals_together():
    signal = torch.tensor([0.0] * 70 + [1.0] * 30)
    bins = S.reliability(signal, torch.ones(100, dtype=torch.bool), bins=10)
    assert [b.size for b in bins] == [70, 30]
    assert S.reliability(signal[:0], torch.ones(0, dtype=torch.bool)) == []


def test_correlation_marks_a_constant_head_and_keeps_the_others():
    x = normal(50)
    matrix = S.correlation(torch.stack([x, -2 * x + 1, torch.ones(50)], dim=1))
    assert matrix[0, 1].item() == pytest.approx(-1)
    assert matrix[0, 0].item() == 1
    assert matrix[2].isnan().all()
    assert matrix[:, 2].isnan().all()


def test_effective_rank_of_isotropic_collinear_and_uneven_features():
    assert S.effective_rank(torch.eye(7).repeat(3, 1)) == pytest.approx(7)
    assert S.effective_rank(torch.outer(torch.arange(1.0, 9), torch.ones(5))) == pytest.approx(1, abs=1e-5)
    uneven = S.effective_rank(torch.diag(torch.tensor([3.0, 1.0])))
    assert uneven == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_effective_rank_of_nothing_is_none():
    assert S.effective_rank(torch.zeros(4, 3)) is None
    assert S.effective_rank(torch.zeros(0, 3)) is None


def test_hidden_norms_are_those_of_bsr() -> None:
    chosen, rejected = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[6.0, 8.0], [0.0, 3.0]])
    expected = {"norm_mean": 19 / 4, "norm_gap_mean": 3.5, "norm_gap_std": 1.5}
    found = S.hidden_norms(chosen, rejected)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["norm_std"] == pytest.approx(torch.tensor([5.0, 1.0, 10.0, 3.0]).std(correction=0).item())
    assert S.hidden_norms(chosen.norm(dim=1), rejected.norm(dim=1)) == pytest.approx(found)


def test_norm_dispersion_by_hand():
    found = S.norm_dispersion(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
    assert found == pytest.approx(
        {"mean": 3.0, "std": math.sqrt(2), "relative": math.sqrt(2) / 3, "gap": 2, "distance": 3}
    )
