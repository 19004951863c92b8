"""What the best-of-n study concludes from curves whose truth is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prudent.engine import EnsembleHead, calibrate
from prudent.kernels import Aggregation, aggregate
from prudent.rlhf.evaluation.best_of_n import PESSIMISTIC, REFERENCES, SCORERS, findings, powers_of_two, rewards, study

P, N = 24, 64


def _gold(seed: int = 0) -> Tensor:
    return torch.rand(P, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _noise(seed: int) -> Tensor:
    return torch.rand(P, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _proxies(good: tuple[str, ...], gold: Tensor) -> dict[str, Tensor]:
    """Scorers in `good` see the gold reward, the others nothing at all."""
    return {name: gold if name in good else _noise(7 + i) for i, name in enumerate(SCORERS)}


def test_pessimism_that_picks_better_than_both_references_wins() -> None:
    lines = findings(study(_proxies(PESSIMISTIC, _gold()), _gold()))
    assert lines[0].startswith("Pessimism wins here: at n = 64, worst case and tradeoff λ=0.4 bring more gold reward")


def test_one_winner_is_named_alone() -> None:
    lines = findings(study(_proxies(("worst",), _gold()), _gold()))
    assert lines[0].startswith("Pessimism wins here: at n = 64, worst case brings")


def test_pessimism_that_picks_worse_does_not_win() -> None:
    lines = findings(study(_proxies(REFERENCES, _gold()), _gold()))
    assert lines[0].startswith("Pessimism does not win here: at n = 64 it costs gold reward (worst case and tradeoff")


def test_no_difference_is_called_none() -> None:
    gold = _gold()
    lines = findings(study({name: _noise(3) for name in SCORERS}, gold))
    assert lines[0] == "Pessimism does not win here: at n = 64, 24 prompts show no difference either way."


def test_a_gain_over_one_reference_alone_is_called_partial() -> None:
    lines = findings(study(_proxies(("mean", *PESSIMISTIC), _gold()), _gold()))
    assert lines[0].startswith("Pessimism helps in part here: at n = 64")
    assert "against the single head" in lines[0]
    assert "against the mean of heads" not in lines[0]


def test_gains_and_losses_together_are_called_mixed() -> None:
    gold = _gold()
    proxies = _proxies(("mean",), gold)
    proxies["single head"] = -gold
    lines = findings(study(proxies, gold))
    assert lines[0].startswith(
        "A mixed result: at n = 64, pessimism gains gold reward (worst case and tradeoff λ=0.4 against the"
    )


def test_a_fall_at_the_end_is_called_over_optimisation_and_a_rise_is_not() -> None:
    gold = _gold()
    proxies = dict.fromkeys(SCORERS, gold)
    # likes good responses, and the very worst best of all: rare, so that only a long search finds it
    hacked = gold.clone()
    hacked[torch.arange(P), gold.argmin(dim=1)] = 2.0
    result = study({**proxies, "single head": hacked}, gold)
    verdicts = {trend.scorer: trend.verdict for trend in result.trends}
    assert verdicts["single head"] == "falls"
    assert verdicts["mean"] == "rises"
    assert (result.trends[0].first, result.trends[0].last) == (16, 64)
    assert any("falls for single head" in line and "over-optimisation" in line for line in findings(result))


def test_every_reading_is_compared_with_both_references_once() -> None:
    found = [(c.scorer, c.against) for c in study(_proxies((), _gold()), _gold()).comparisons]
    assert len(found) == len(set(found)) == 7
    assert {(name, against) for name in PESSIMISTIC for against in REFERENCES} <= set(found)


def test_the_oracle_is_the_upper_bound_and_n_1_is_the_plain_mean() -> None:
    gold = _gold()
    result = study(_proxies(PESSIMISTIC, gold), gold)
    for curve in result.curves.values():
        assert (curve.gold <= result.oracle.gold + 1e-12).all()
        assert curve.gold[0].item() == pytest.approx(gold.mean().item())


@pytest.mark.parametrize(("largest", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])])
def test_n_goes_in_powers_of_two_up_to_all(largest: int, expected: list[int]) -> None:
    assert powers_of_two(largest) == expected


def test_rewards_are_what_the_heads_own_aggregations_give() -> None:
    torch.manual_seed(0)
    features = torch.randn(30, 8)
    single, ensemble = EnsembleHead(8, 1, aggregation="mean"), EnsembleHead(8, 5)
    calibrate(ensemble, features)
    found = rewards(single, ensemble, features)
    assert tuple(found) == SCORERS
    with torch.no_grad():
        torch.testing.assert_close(found["single head"], single(features).mean[:, 0])
        torch.testing.assert_close(found["worst"], ensemble(features).mean.min(dim=1).values)
        out = ensemble(features)
        for name in ("nominal", "tradeoff:0.4"):
            expected = aggregate(out.mean, out.std, out.mean, Aggregation.parse(name), ensemble.std_ref)
            torch.testing.assert_close(found[name], expected)
            torch.testing.assert_close(found[name], ensemble(features, aggregation=name).reward)
