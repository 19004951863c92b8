"""The demo's tables, examples and sentences follow from the numbers they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.engine import EnsembleHead
from prudent.rlhf.demo.candidates import MIXTURE, OWN, Candidates
from prudent.rlhf.demo.distances import HELD_OUT, TRAINING, Measured, distance_rows
from prudent.rlhf.demo.distances import table_rows as distance_table
from prudent.rlhf.demo.report import (
    accuracy_rows,
    comparison_rows,
    examples,
    foreign_picks,
    picks,
    signal_rows,
    table,
)
from prudent.rlhf.demo.rewards import ENSEMBLE, SINGLE, TITLES, TRUST
from prudent.rlhf.sampling.stored import Rollout

REWARDS = (SINGLE, ENSEMBLE, TRUST)


def _attack(gold: float) -> dict[str, Any]:
    curve = [{"value": gold * x, "low": gold * x - 0.1, "high": gold * x + 0.1} for x in (0.0, 0.5, 1.0)]
    gap = {"value": 0.1, "low": -0.05, "high": 0.25, "verdict": "no difference shown"}
    return {
        "prompts": 40,
        "draws": 2,
        "n": [1, 4, 16],
        "scorers": dict.fromkeys((*REWARDS, "oracle"), curve),
        "comparisons": {SINGLE: gap, ENSEMBLE: gap},
    }


def _metrics(gold: bool = True) -> dict[str, Any]:
    accuracy = {name: {"value": 0.7 + i / 100, "low": 0.65, "high": 0.8} for i, name in enumerate(REWARDS)}
    return {
        "pairs": {"accuracy": accuracy},
        "attacks": {"careful": {OWN: _attack(0.4), MIXTURE: _attack(0.2)}} if gold else None,
        "findings": ["The headline."] if gold else None,
        "foreign_picks": {SINGLE: 13, ENSEMBLE: 4, TRUST: 1},
        "ppo": None,
    }


def test_the_table_has_a_row_for_each_reward_and_the_finding_below() -> None:
    lines = table(_metrics()).splitlines()
    names = (*REWARDS, "oracle")
    assert [line[: len(TITLES[name])] for line, name in zip(lines[1:5], names, strict=True)] == [
        TITLES[name] for name in names
    ]
    assert lines[0].endswith("gold, n=1  own, n=16  mixture, n=16  foreign picks")
    assert lines[1].split()[3:] == ["70.0", "65.0", "to", "80.0", "+0.000", "+0.400", "+0.200", "13", "of", "40"]
    assert lines[-1] == "The headline."


def test_without_a_judge_the_table_says_so() -> None:
    lines = table(_metrics(gold=False)).splitlines()
    assert len(lines) == 6
    assert "gold, n" not in lines[0]
    assert "no best-of-n" in lines[-1]


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.01, 0.05, "higher"), (-0.07, -0.01, "lower"), (-0.02, 0.03, "no difference shown")]
)
def test_an_accuracy_difference_is_claimed_only_if_its_interval_excludes_0(low: float, high: float, said: str) -> None:
    gap = {"value": (low + high) / 2, "low": low, "high": high}
    _, row = accuracy_rows({"difference": {f"{ENSEMBLE} - {SINGLE}": gap}})
    assert row == [TITLES[ENSEMBLE], f"{100 * gap['value']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", said]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.55, 0.6, "higher on errors"), (0.4, 0.45, "lower on errors: misleading"), (0.45, 0.52, "not shown to differ")],
)
def test_a_signal_is_credited_only_if_its_interval_excludes_a_half(low: float, high: float, said: str) -> None:
    signals = {"std": {"nominal": {"value": (low + high) / 2, "low": low, "high": high}}}
    _, row = signal_rows({"signals": {"right_or_wrong": signals}})
    assert row[0] == "predicted std of the nominal head"
    assert row[3].startswith(said)


def test_every_judge_and_pool_is_compared_in_a_row() -> None:
    head, own, mixed = comparison_rows({"careful": {OWN: _attack(0.4), MIXTURE: _attack(0.2)}})
    assert head[1:] == ["trust region minus tuned single head", "trust region minus tradeoff λ=0.4 (BRME)"]
    assert own == ["careful judge, the model's own, n=16", *["+0.100 [-0.050, +0.250]"] * 2]
    assert mixed[0] == "careful judge, mixture, n=16"


def test_examples_show_the_least_and_the_most_disagreement_of_different_prompts() -> None:
    torch.manual_seed(0)
    head = EnsembleHead(6, 5)
    rollouts = [Rollout(f"p{i}", [f"r{i}{j}" for j in range(7)], [True] * 7, torch.randn(7, 6)) for i in range(5)]
    rows = examples(head, rollouts, torch.rand(5, 7))["strips"]["rows"]
    with torch.no_grad():
        spread = head(torch.cat([r.features for r in rollouts])).mean.std(dim=1, correction=0)
    assert len(rows) == 4
    assert rows[0]["spread"] == pytest.approx(spread.min().item())
    assert rows[2]["spread"] == pytest.approx(spread.max().item())
    for half in (rows[:2], rows[2:]):
        assert len({row["prompt"] for row in half}) == 2
    for row in rows:
        assert row["worst"] == row["mean"].index(min(row["mean"]))
        assert row["nominal"] == row["std"].index(min(row["std"]))
        positions = [value for mark in row["heads"] for value in (mark["from"], mark["x"], mark["to"])]
        assert 0 <= min(positions) <= max(positions) <= 420


def _candidates() -> tuple[Candidates, dict[str, torch.Tensor]]:
    """Two prompts with three own responses and one foreign each; the single head picks the second prompt's."""
    every = torch.arange(4)
    found = Candidates(
        ["p0", "p1"],
        [["a", "b", "c", "love love"], ["d", "e", "f", "nice nice"]],
        [["", "", "", "repeated"]] * 2,
        torch.zeros(2, 4, 1),
        {OWN: every[:3], MIXTURE: torch.tensor([0, 1, 3])},
        {},
    )
    single = torch.tensor([[0.0, 2.0, 9.0, 1.0], [0.0, 1.0, 9.0, 3.0]])
    return found, {SINGLE: single, ENSEMBLE: single, TRUST: single - torch.tensor([0.0, 0.0, 0.0, 5.0])}


def test_a_foreign_pick_of_the_single_head_is_shown_beside_the_others_with_its_distance() -> None:
    candidates, rewards = _candidates()
    far = torch.tensor([[0.5, 0.5, 0.5, 2.0]] * 2)
    (shown,) = picks(candidates, rewards, far, torch.zeros(2, 4))
    assert shown["prompt"] == "p1"
    wrong, right = shown["rows"]
    assert (wrong["response"], wrong["kind"], wrong["distance"]) == ("nice nice", "repeated", 2.0)
    assert wrong["rewards"] == [TITLES[SINGLE], TITLES[ENSEMBLE]]
    assert (wrong["single"], wrong["trust"]) == (3.0, -2.0)
    assert (right["response"], right["rewards"], right["kind"]) == ("e", [TITLES[TRUST]], "")
    assert foreign_picks(candidates, rewards) == {SINGLE: 1, ENSEMBLE: 1, TRUST: 0}


def test_distances_are_described_by_quantiles_and_compared_with_held_out_responses() -> None:
    known = Measured(torch.linspace(0, 1.25, 100), torch.arange(100) // 10)
    beyond = Measured(torch.linspace(2, 3, 10), torch.arange(10))
    rows = distance_rows({TRAINING: known, HELD_OUT: known, "repeated": beyond, "code": Measured(*known[:2])})
    by_kind = {row["kind"]: row for row in rows}
    assert by_kind["repeated"]["auroc"]["value"] == 1.0
    assert by_kind["code"]["auroc"]["value"] == pytest.approx(0.5)
    assert by_kind[HELD_OUT]["auroc"] is None
    assert by_kind[HELD_OUT]["beyond"] == pytest.approx(0.2)
    assert by_kind["repeated"]["median"] == pytest.approx(2.5)
    cells = distance_table(rows)
    assert cells[3][:5] == ["repeated", "10", "2.50", "100", "1.00"]
    assert (
        distance_rows({TRAINING: known, HELD_OUT: known, "none": Measured(torch.empty(0), torch.empty(0))}) == rows[:2]
    )
