"""Best-of-n against the demo's rewards, and the sentences that the intervals decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.rlhf.demo.attack import as_dict, curves, findings
from prudent.rlhf.demo.candidates import MIXTURE, OWN
from prudent.rlhf.demo.rewards import ENSEMBLE, SINGLE, TRUST

POOL = torch.arange(16)


def _gold(seed: int = 0) -> torch.Tensor:
    return torch.randn(40, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attack(single: float, ensemble: float, trust: float) -> dict[str, Any]:
    """Rewards that know gold with these weights beside noise of their own."""
    gold = _gold()
    draws = [
        {
            name: weight * gold + _gold(10 * draw + i + 1)
            for i, (name, weight) in enumerate([(SINGLE, single), (ENSEMBLE, ensemble), (TRUST, trust)])
        }
        for draw in range(3)
    ]
    return as_dict(curves(draws, gold, POOL))


def _findings(careful_mixture: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return findings({"careful": {MIXTURE: careful_mixture, OWN: other}, "vader": {MIXTURE: other, OWN: other}}, 0.1)


def test_a_curve_is_a_mean_over_draws_and_prompts_and_the_judge_itself_is_best() -> None:
    gold = _gold()
    draws = [{SINGLE: _gold(1), ENSEMBLE: gold, TRUST: gold}, {SINGLE: _gold(2), ENSEMBLE: gold, TRUST: gold}]
    found = curves(draws, gold, POOL)
    assert found[SINGLE].n == [1, 2, 4, 8, 16]
    assert found[SINGLE].gold.shape == (2, 40, 5)
    torch.testing.assert_close(found[TRUST].gold, found["oracle"].gold)
    assert float(found[TRUST].gold[0, :, -1].mean()) == pytest.approx(float(gold[:, :16].amax(1).mean()))
    picked = gold[torch.arange(40), draws[1][SINGLE][:, :16].argmax(1)]
    torch.testing.assert_close(found[SINGLE].gold[1, :, -1], picked)


def test_candidates_outside_of_the_pool_are_not_picked() -> None:
    gold = _gold()
    better = gold.clone()
    better[:, 16:] = 100
    draws = [dict.fromkeys((SINGLE, ENSEMBLE, TRUST), better)]
    assert float(curves(draws, better, POOL)[TRUST].gold.max()) < 100


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((0, 0, 9), "the trust region picks responses with more gold reward than the tuned single head"),
        ((9, 9, 0), "the trust region picks responses with less gold reward than the tuned single head"),
        ((1, 1, 1), "no difference between the trust region and the tuned single head"),
    ],
)
def test_the_first_sentence_claims_what_the_intervals_carry(weights: tuple[int, int, int], said: str) -> None:
    first, second, _, fourth = _findings(_attack(*weights), _attack(1, 1, 1))
    assert first.startswith(f"With 10 % foreign text among 16 candidates, {said}")
    assert second.startswith("Among the model's own 16 responses, no difference between")
    assert fourth.startswith("Judged and taught by VADER, in the same mixture, no difference between")


def test_each_other_reward_gets_the_verdict_of_its_own_interval() -> None:
    (first, *_) = _findings(_attack(0, 9, 9), _attack(1, 1, 1))
    more, none = first.split("; ")
    assert "more gold reward than the tuned single head (+" in more
    assert "BRME" not in more
    assert none.startswith("no difference from the tradeoff λ=0.4 (BRME) (")
    (mixed, *_) = _findings(_attack(0, 9, 2), _attack(1, 1, 1))
    assert "more gold reward than the tuned single head" in mixed
    assert "less gold reward than the tradeoff" in mixed


def test_over_optimisation_is_claimed_only_if_an_interval_says_that_gold_falls() -> None:
    falling = _attack(-3, 1, 1)
    assert falling["trends"][SINGLE]["verdict"] == "falls"
    third = _findings(falling, _attack(1, 1, 1))[2]
    assert (
        third
        == "Over-optimisation: from n = 4 to n = 16 of the mixture, the gold reward falls for the tuned single head."
    )
    assert _findings(_attack(1, 1, 1), falling)[2].startswith("No over-optimisation is shown")
