"""Measures of heads on rewards made so that the answers are known."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from prudent.kernels import aggregate
from prudent.rlhf.evaluation import statistics as S
from prudent.rlhf.evaluation.evaluate import evaluate_heads
from prudent.rlhf.evaluation.metrics import pool_small_groups
from prudent.rlhf.evaluation.report import format_metrics


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(mean: torch.Tensor, std: torch.Tensor | float = 0.5) -> SimpleNamespace:
    return SimpleNamespace(mean=mean, std=torch.as_tensor(std, dtype=mean.dtype).expand(mean.shape))


def ensemble(pairs: int = 400, k: int = 5, noise: float = 1.0) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Every head is the truth plus its own noise; chosen is better by about 1."""
    sides = []
    for side, shift in enumerate((1.0, 0.0)):
        truth = normal(pairs, 1, seed=side) + shift
        sides.append(
            heads(truth + noise * normal(pairs, k, seed=10 + side), 0.2 + normal(pairs, k, seed=20 + side).abs())
        )
    return sides[0], sides[1]


def test_the_result_is_json_and_has_every_part():
    chosen, rejected = ensemble()
    result = evaluate_heads(
        chosen,
        rejected,
        prompts=[i // 4 for i in range(400)],
        scores=(normal(400) + 1, normal(400, seed=1)),
        compare={"single head": (normal(400) + 0.5, normal(400, seed=1))},
        features=(normal(400, 8), normal(400, 8, seed=1)),
        foreign=ensemble(50),
        resamples=100,
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["pairs"], result["prompts"], result["excluded"], result["heads"]) == (400, 100, 0, 5)
    assert list(result["accuracy"]) == [
        *("nominal", "mean", "worst", "tradeoff:0.4"),
        *(f"head {k}" for k in range(5)),
        "single head",
    ]
    assert set(result["accuracy"]) == set(result["margin"]) == set(result["coverage"])
    assert set(result["difference"]) == {
        *(f"{name} - mean" for name in ("nominal", "worst", "tradeoff:0.4")),
        *(f"{name} - single head" for name in ("nominal", "mean", "worst", "tradeoff:0.4")),
    }
    assert result["features"]["width"] == 8
    assert 6 < result["features"]["effective_rank"] <= 8
    assert set(result["reasons"]) == {"distance"}


def test_accuracies_are_of_the_rewards_that_the_op_gives():
    chosen, rejected = ensemble()
    result = evaluate_heads(chosen, rejected, aggregation="lcb:1", resamples=100)
    for name, spec in (
        ("nominal", "nominal"),
        ("mean", "mean"),
        ("worst", "min"),
        ("lcb:1", "lcb:1"),
        ("head 3", "head:3"),
    ):
        from prudent import Aggregation

        c, r = (aggregate(s.mean, s.std, s.mean, Aggregation.parse(spec)) for s in (chosen, rejected))
        assert result["accuracy"][name]["value"] == pytest.approx((c > r).double().mean().item()), name
    assert result["accuracy"]["mean"]["low"] < result["accuracy"]["mean"]["value"] < result["accuracy"]["mean"]["high"]


def test_ties_are_wrong_and_counted():
    side = heads(torch.ones(6, 2))
    result = evaluate_heads(side, side, resamples=100)
    assert result["accuracy"]["mean"]["value"] == 0
    assert result["accuracy"]["mean"]["ties"] == 6


def test_pairs_that_are_not_finite_are_left_out_and_counted():
    chosen, rejected = ensemble(40)
    clean = evaluate_heads(
        heads(chosen.mean[3:], chosen.std[3:]), heads(rejected.mean[3:], rejected.std[3:]), resamples=100
    )
    chosen.mean[0, 2] = math.nan
    rejected.std = rejected.std.clone()
    rejected.std[1, 0] = math.inf
    other = (normal(40), normal(40))
    other[1][2] = math.nan
    result = evaluate_heads(chosen, rejected, compare={"other": other}, resamples=100)
    assert (result["pairs"], result["excluded"]) == (37, 3)
    assert result["accuracy"]["nominal"] == clean["accuracy"]["nominal"]
    assert "left out, for rewards that are not finite: 3\n" in format_metrics(result)


def test_no_finite_pair_is_refused():
    with pytest.raises(ValueError, match="none among 2"):
        evaluate_heads(heads(torch.full((2, 3), math.nan)), heads(torch.ones(2, 3)))


def test_a_std_that_knows_scores_above_a_half_and_one_that_does_not_about_a_half():
    generator = torch.Generator().manual_seed(0)
    unsure = torch.rand(2000, generator=generator)
    # right with probability 1 - unsure / 2
    right = torch.rand(2000, generator=generator) > unsure / 2
    margin = torch.where(right, 1.0, -1.0)
    zero = heads(torch.zeros(2000, 3), 0.1)
    knowing = heads(margin[:, None].expand(-1, 3).clone(), unsure[:, None] + 0.01)
    result = evaluate_heads(knowing, zero, resamples=200)
    found = result["signals"]["right_or_wrong"]
    assert found["std"]["nominal"]["low"] > 0.65
    first, *_, last = result["reliability"]["std"]
    assert first["accuracy"]["value"] > 0.9
    assert last["accuracy"]["value"] < 0.65
    ignorant = heads(knowing.mean, normal(2000, 3, seed=5).abs() + 0.1)
    found = evaluate_heads(ignorant, zero, resamples=200)["signals"]["right_or_wrong"]["std"]["nominal"]
    assert found["low"] < 0.5 < found["high"]


def test_disagreement_tells_foreign_data_where_heads_part():
    own, foreign = ensemble(300, noise=0.3), ensemble(200, noise=3.0)
    found = evaluate_heads(*own, foreign=foreign, resamples=200)["signals"]["own_or_foreign"]
    assert found["disagreement"]["low"] > 0.95
    assert found["pairs"] == 200
    same = evaluate_heads(*own, foreign=ensemble(200, noise=0.3), resamples=200)["signals"]["own_or_foreign"]
    assert same["std"]["low"] < 0.5 < same["std"]["high"]


def test_the_worst_head_underscores_and_one_head_is_about_even():
    truth = (normal(3000) + 1, normal(3000, seed=1))
    sides = [heads(t[:, None] + 0.5 * normal(3000, 5, seed=2 + i)) for i, t in enumerate(truth)]
    found = evaluate_heads(*sides, scores=truth, resamples=100)["scoring"]
    assert found["scorers"]["worst"]["under"] > 0.9
    assert found["scorers"]["head 2"]["under"] == pytest.approx(0.5, abs=0.03)
    assert found["scorers"]["mean"]["rank_correlation"] > found["scorers"]["head 0"]["rank_correlation"] > 0.8


def test_scores_that_are_missing_leave_their_responses_out():
    chosen, rejected = ensemble(50)
    scores = (normal(50), normal(50, seed=1))
    scores[0][:20] = math.nan
    assert evaluate_heads(chosen, rejected, scores=scores, resamples=100)["scoring"]["responses"] == 80
    none = evaluate_heads(chosen, rejected, scores=(scores[0] * math.nan, scores[1] * math.nan), resamples=100)
    assert none["scoring"] is None
    assert none["reasons"]["scoring"] == "no given scores"


def test_one_head_is_one_scorer_and_what_it_cannot_say_has_a_reason():
    chosen, rejected = ensemble(60, k=1)
    result = evaluate_heads(chosen, heads(rejected.mean), aggregation="mean", resamples=100)
    assert list(result["accuracy"]) == ["single head"]
    assert result["signals"]["right_or_wrong"]["disagreement"]["single head"]["value"] is None
    assert "one head" in result["reasons"]["signals.right_or_wrong.disagreement.single head"]
    assert result["signals"]["own_or_foreign"] is None
    assert result["reasons"]["signals.own_or_foreign"] == "no foreign data given"
    assert "single head" in format_metrics(result)


def test_the_std_of_one_head_is_left_out_with_a_reason():
    chosen, rejected = ensemble(60, k=1)
    scores = (normal(60) + 1, normal(60, seed=1))
    result = evaluate_heads(chosen, rejected, aggregation="mean", scores=scores, foreign=ensemble(30, k=1))
    assert result["signals"]["right_or_wrong"]["std"] is None
    assert result["signals"]["own_or_foreign"]["std"] is None
    assert result["reliability"]["std"] is None
    assert result["scoring"]["std_against_error"] is None
    for path in ("signals.*.std", "reliability.std", "scoring.std_against_error"):
        assert "Bradley-Terry does not train" in result["reasons"][path]
    assert result["signals"]["right_or_wrong"]["small margin"]["single head"]["value"] is not None
    assert not any(line.startswith("std") for line in format_metrics(result).splitlines())


def test_all_right_and_one_prompt_give_none_with_a_reason():
    result = evaluate_heads(
        heads(torch.ones(5, 2) + normal(5, 2).abs()), heads(torch.zeros(5, 2)), prompts=["same"] * 5
    )
    assert result["accuracy"]["mean"] == {"value": 1.0, "low": None, "high": None, "ties": 0}
    assert result["reasons"]["accuracy.*.low"] == "one prompt: nothing to resample"
    assert "all pairs are right" in result["reasons"]["signals.right_or_wrong.small margin.nominal"]
    assert format_metrics(result)


def test_a_head_that_says_one_thing_has_no_correlation():
    chosen, rejected = ensemble(30)
    chosen.mean[:, 1] = rejected.mean[:, 1] = 3.0
    result = evaluate_heads(chosen, rejected, resamples=100)
    assert result["head_summary"]["correlation"]["reward"][1] == [None] * 5
    assert "same reward everywhere" in result["reasons"]["head_summary.correlation"]


def test_the_nominal_shares_say_which_head_is_the_surest():
    chosen, rejected = ensemble(30, k=3)
    sharp = torch.tensor([0.9, 0.1, 0.5])
    result = evaluate_heads(heads(chosen.mean, sharp), heads(rejected.mean, sharp), resamples=100)
    assert result["head_summary"]["nominal_share"] == [0.0, 1.0, 0.0]
    assert result["accuracy"]["nominal"] == result["accuracy"]["head 1"]


def test_relative_std_is_shown_beside_least_std_where_the_heads_have_typical_stds():
    chosen, rejected = ensemble(100)
    std_ref = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    result = evaluate_heads(chosen, rejected, std_ref=std_ref, resamples=100)
    index = (chosen.std / std_ref).argmin(1), (rejected.std / std_ref).argmin(1)
    c, r = (side.mean.gather(1, i[:, None])[:, 0] for side, i in zip((chosen, rejected), index, strict=True))
    assert result["accuracy"]["nominal (relative std)"]["value"] == pytest.approx((c > r).double().mean().item())
    spec = "tradeoff:0.4,nominal=relative_std"
    same = evaluate_heads(chosen, rejected, aggregation=spec, std_ref=std_ref, resamples=100)
    assert same["accuracy"]["nominal"]["value"] == result["accuracy"]["nominal (relative std)"]["value"]


def test_sources_are_standardised_apart():
    chosen, rejected = ensemble(200)
    scale = torch.where(torch.arange(200) % 2 == 0, 1.0, 100.0)[:, None]
    apart = evaluate_heads(
        heads(chosen.mean * scale),
        heads(rejected.mean * scale),
        sources=["a", "b"] * 100,
        resamples=100,
    )
    plain = evaluate_heads(heads(chosen.mean), heads(rejected.mean), sources=["a", "b"] * 100, resamples=100)
    assert apart["margin"]["mean"] == pytest.approx(plain["margin"]["mean"])


@pytest.mark.parametrize(
    ("sizes", "merged", "groups"),
    [
        ([30, 40], [], 2),
        ([30, 5, 40, 15], [1, 3], 3),  # 5 and 15 are enough together
        ([50, 2, 30], [1, 2], 2),  # 2 alone are not: the next smallest joins
        ([2, 3], [0, 1], 1),
        ([2], [], 1),
    ],
)
def test_groups_too_small_for_a_scale_are_pooled(sizes, merged, groups):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    pooled, rows = pool_small_groups(labels, 20)
    assert labels[rows].unique().tolist() == merged
    assert len(pooled.unique()) == groups
    assert len(pooled[rows].unique()) == min(1, len(merged))
    assert torch.equal(pooled[~rows], labels[~rows])


def test_a_source_too_small_for_a_scale_is_standardised_with_another_and_that_is_said():
    chosen, rejected = ensemble(60)
    sources = ["a"] * 56 + ["b", "c", "d", "e"]
    scores = (normal(60) + 1, normal(60, seed=1))
    scores[0][:50], scores[1][:50] = math.nan, math.nan  # 20 scored responses: no source has enough
    found = evaluate_heads(chosen, rejected, sources=sources, scores=scores, resamples=100)
    plain = evaluate_heads(chosen, rejected, scores=scores, resamples=100)
    assert found["margin"] == plain["margin"]
    assert found["scoring"] == plain["scoring"]
    assert "5 of 5 sources, 60 pairs in all" in found["reasons"]["margin.*"]
    large = evaluate_heads(chosen, rejected, sources=["a"] * 30 + ["b"] * 30, scores=scores, resamples=100)
    assert "margin.*" not in large["reasons"]
    # all scored responses are of the second source
    assert large["scoring"] == plain["scoring"]


def test_the_table_gives_coverage_in_the_scorers_own_variance():
    chosen, rejected = ensemble(100)
    scaled = evaluate_heads(heads(100 * chosen.mean), heads(100 * rejected.mean), resamples=100)
    plain = evaluate_heads(heads(chosen.mean), heads(rejected.mean), resamples=100)
    area = f"{plain['coverage']['mean']['normalised_area']:.2f}"
    for result in (scaled, plain):
        lines = format_metrics(result).splitlines()
        assert any(line.endswith("coverage / std²") for line in lines)
        assert next(line for line in lines if line.startswith("mean ")).endswith(f" {area}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"aggregation": "tradeof"}, "aggregation: kind"),
        ({"aggregation": "head:5"}, "below 5"),
        ({"aggregation": "nominal,nominal=relative_std"}, "std_ref"),
        ({"prompts": ["x"]}, "expected 9 prompts"),
        ({"compare": {"other": (torch.zeros(8), torch.zeros(9))}}, "compare 'other'"),
        ({"foreign": (heads(torch.full((2, 5), math.nan)), heads(torch.zeros(2, 5)))}, "foreign"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        evaluate_heads(*ensemble(9), **given)


def test_sides_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        evaluate_heads(heads(torch.zeros(3, 2)), heads(torch.zeros(4, 2)))


def test_the_effective_rank_of_many_rows_is_taken_from_a_sample(monkeypatch):
    from prudent.rlhf.evaluation import metrics

    monkeypatch.setattr(metrics, "RANK_ROWS", 10)
    chosen, rejected = ensemble(25)
    features = (normal(25, 4), normal(25, 4, seed=1))
    found = evaluate_heads(chosen, rejected, features=features, resamples=100)["features"]
    assert found["effective_rank_rows"] == 18
    assert found["effective_rank"] == S.effective_rank(torch.cat([features[0][::3], features[1][::3]]))
