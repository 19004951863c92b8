"""`prudent study stochastic`: the oracle, lemma 1 to the bit, and noise that hurts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prudent.rlhf.study.stochastic import (
    Setting,
    StochasticConfig,
    degrade,
    good_policies,
    minimum_moments,
    run_stochastic,
)
from prudent.rlhf.study.stochastic_report import findings
from prudent.rlhf.study.toy_world import log_policy


@pytest.mark.parametrize(
    ("k", "mean", "variance"),
    [(1, 0.0, 1.0), (2, -0.5642, 0.6817), (3, -0.8463, 0.5595), (4, -1.0294, 0.4917), (5, -1.1630, 0.4475)],
)
def test_the_least_of_k_normals_has_the_known_moments(k: int, mean: float, variance: float) -> None:
    assert minimum_moments(k) == pytest.approx((mean, variance), abs=1e-4)


def test_the_policies_start_good_at_every_prompt() -> None:
    gold = log_policy(good_policies(StochasticConfig(seeds=5, start=0.8))).exp().diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(gold, torch.full_like(gold, 0.8), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "setting", [Setting("sgd"), Setting("adam"), Setting("adam", epochs=4), Setting("sgd", whiten=True)], ids=str
)
def test_a_constant_reward_moves_nothing_and_a_random_one_does(setting: Setting) -> None:
    """Lemma 1 with an exact critic: the advantage is 0, and with it the gradient."""
    config = StochasticConfig(seeds=4, steps=15)
    gold = degrade(good_policies(config), setting, config)
    assert torch.equal(gold["constant"][0], gold["constant"][-1])
    assert float((gold["random"][0] - gold["random"][-1]).abs().min()) > 0
    assert torch.equal(gold["random"][0], gold["worst of random"][0])


def test_the_study_writes_everything_and_repeats_itself(tmp_path: Path) -> None:
    results = [
        run_stochastic(StochasticConfig(output=tmp_path / name, seeds=3, steps=5), progress=False) for name in "ab"
    ]
    assert results[0].metrics == results[1].metrics
    saved = json.loads((tmp_path / "a" / "stochastic.json").read_text())
    assert saved["oracle"]["5"] == pytest.approx([-1.1630, 0.4475], abs=1e-4)
    assert "| 5 | -1.1630 | 0.4475 |" in str(results[0])
    assert (tmp_path / "a" / "stochastic.png").stat().st_size > 10_000


def test_the_order_is_said_to_hold_only_where_the_intervals_show_it() -> None:
    def metrics(less: list[float]) -> dict[str, object]:
        arms = {
            "constant": {"degradation": [0.0, 0.0, 0.0], "less_than_random": [0.3, 0.2, 0.4]},
            "worst of random": {"degradation": [0.2, 0.1, 0.3], "less_than_random": less},
            "random": {"degradation": [0.3, 0.2, 0.4], "less_than_random": [0.0, 0.0, 0.0]},
        }
        return {"settings": {"SGD": arms}}

    assert findings(metrics([0.1, 0.05, 0.15]))[0].endswith("is shown under 1 of 1 updates: SGD.")
    assert findings(metrics([0.1, -0.05, 0.25]))[0].endswith("is shown under 0 of 1 updates.")
