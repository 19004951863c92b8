"""The demo's tables and examples follow from the numbers they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.engine import EnsembleHead
from prudent.rlhf.demo.report import accuracy_rows, best_of_n_rows, examples, signal_rows, table
from prudent.rlhf.evaluation.best_of_n import TITLES
from prudent.rlhf.sampling.stored import Rollout

NAMES = ("single head", "mean", "nominal", "worst", "tradeoff:0.4")


def _metrics(gold: bool = True) -> dict[str, Any]:
    accuracy = {name: {"value": 0.7 + i / 100, "low": 0.65, "high": 0.8, "ties": 0} for i, name in enumerate(NAMES)}
    curves = {
        "n": [1, 2, 4, 8, 16],
        "scorers": {name: {"gold": [0.1, 0.2, 0.3, 0.4, 0.5]} for name in (*NAMES, "oracle")},
        "findings": ["The headline."],
    }
    return {
        "pairs": {"accuracy": accuracy},
        "noisy_accuracy": accuracy if gold else None,
        "best_of_n": curves if gold else None,
    }


def test_the_table_has_a_row_for_each_scorer_and_the_headline_below() -> None:
    lines = table(_metrics()).splitlines()
    assert [line[: len(TITLES[name])] for line, name in zip(lines[1:7], (*NAMES, "oracle"), strict=True)] == [
        TITLES[name] for name in (*NAMES, "oracle")
    ]
    assert lines[0].endswith("gold, n=1  gold, n=4  gold, n=16")
    assert lines[3].split()[1:] == ["72.0", "65.0", "to", "80.0", "72.0", "+0.100", "+0.300", "+0.500"]
    assert lines[-1] == "The headline."


def test_without_gold_the_table_says_so() -> None:
    lines = table(_metrics(gold=False)).splitlines()
    assert len(lines) == 8
    assert "gold, n" not in lines[0]
    assert "no best-of-n" in lines[-1]


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.01, 0.05, "higher"), (-0.07, -0.01, "lower"), (-0.02, 0.03, "no difference shown")]
)
def test_an_accuracy_difference_is_claimed_only_if_its_interval_excludes_0(low: float, high: float, said: str) -> None:
    gap = {"value": (low + high) / 2, "low": low, "high": high}
    _, row = accuracy_rows({"difference": {"nominal - single head": gap}})
    assert row == ["nominal", f"{100 * gap['value']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", said]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.55, 0.6, "higher on errors"), (0.4, 0.45, "lower on errors: misleading"), (0.45, 0.52, "not shown to differ")],
)
def test_a_signal_is_credited_only_if_its_interval_excludes_a_half(low: float, high: float, said: str) -> None:
    signals = {"std": {"nominal": {"value": (low + high) / 2, "low": low, "high": high}}}
    _, row = signal_rows({"signals": {"right_or_wrong": signals}})
    assert row[0] == "predicted std of the nominal head"
    assert row[3].startswith(said)


def test_best_of_n_is_compared_with_both_references_and_with_itself() -> None:
    gap = {"value": 0.1, "low": -0.05, "high": 0.25}
    curves = {
        "comparisons": [{"scorer": "worst", "against": "mean", "n": 16, **gap}],
        "trends": [{"scorer": "worst", "first": 4, "last": 16, **gap}],
    }
    head, row = best_of_n_rows(curves)
    assert head == ["gold reward at n=16", "minus single head", "minus mean of heads", "minus its own at n=4"]
    assert row == ["worst case", "", "+0.100 [-0.050, +0.250]", "+0.100 [-0.050, +0.250]"]


def test_examples_show_the_least_and_the_most_disagreement_of_different_prompts() -> None:
    torch.manual_seed(0)
    head = EnsembleHead(6, 5)
    rollouts = [Rollout(f"p{i}", [f"r{i}{j}" for j in range(7)], [True] * 7, torch.randn(7, 6)) for i in range(5)]
    rewards = {name: torch.randn(35) for name in NAMES}
    gold = torch.rand(5, 7)
    found = examples(head, rollouts, gold, rewards)
    rows = found["strips"]["rows"]
    with torch.no_grad():
        spread = head(torch.cat([r.features for r in rollouts])).mean.std(dim=1, correction=0)
    assert rows[0]["spread"] == pytest.approx(spread.min().item())
    assert rows[3]["spread"] == pytest.approx(spread.max().item())
    for half in (rows[:3], rows[3:]):
        assert len({row["prompt"] for row in half}) == 3
    for row in rows:
        assert row["worst"] == row["mean"].index(min(row["mean"]))
        assert row["nominal"] == row["std"].index(min(row["std"]))
        positions = [value for mark in row["heads"] for value in (mark["from"], mark["x"], mark["to"])]
        assert min(positions) >= 0
        assert max(positions) <= found["strips"]["width"]
    assert [pick["prompt"] for pick in found["picks"]] == ["p0", "p1", "p2", "p3"]
    by_scorer = {name: row for row in found["picks"][0]["rows"] for name in row["scorers"]}
    assert set(by_scorer) == set(TITLES.values())
    assert by_scorer["single head"]["response"] == f"r0{int(rewards['single head'][:7].argmax())}"
    assert by_scorer["the gold scorer itself"]["gold"] == pytest.approx(gold[0].max().item())
    responses = [row["response"] for row in found["picks"][0]["rows"]]
    assert len(responses) == len(set(responses)), "who picked the same stands in one row"
