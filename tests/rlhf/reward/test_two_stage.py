"""The two-stage recipe: what stage 1 hands to stage 2, what is returned, where it may stop and begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prudent.engine import EnsembleHead
from prudent.rlhf.reward.config import BradleyTerryConfig, BRMEConfig
from prudent.rlhf.reward.fit import PairFeatures, fit_heads
from prudent.rlhf.reward.two_stage import fit_two_stages, preference_probability

BT, BRME = BradleyTerryConfig(epochs=3, lr=0.03, seed=1), BRMEConfig(epochs=2, num_heads=2, seed=2)


def _pairs(count: int = 60) -> PairFeatures:
    g = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(count, 8, generator=g) + 0.5, torch.randn(count, 8, generator=g)
    return PairFeatures(chosen, rejected, None, torch.rand(count, generator=g))


def test_stage_2_learns_from_the_probabilities_of_stage_1() -> None:
    pairs = _pairs()
    heads = fit_two_stages(pairs, BT, BRME, seed=5, aggregation="min", progress=False)
    sides = pairs.chosen, pairs.rejected
    single = fit_heads(*sides, BT.model_copy(update={"seed": 6}), margin=pairs.margin, progress=False).head
    p_hat = torch.sigmoid((single(sides[0]).reward - single(sides[1]).reward).double()).detach()
    config = BRME.model_copy(update={"seed": 7})
    ensemble = fit_heads(*sides, config, p_hat=p_hat, aggregation="min", progress=False).head
    assert torch.equal(heads.single.weight, single.weight)
    torch.testing.assert_close(heads.final.weight, ensemble.weight, rtol=1e-4, atol=1e-6)
    assert str(heads.final.aggregation) == "min"


def test_without_stage_2_the_single_head_is_the_final_one() -> None:
    heads = fit_two_stages(_pairs(), BT, None, progress=False)
    assert heads.final is heads.single


def test_a_given_stage_1_is_not_trained(tmp_path: Path) -> None:
    given = EnsembleHead(8, 1, aggregation="mean")
    heads = fit_two_stages(_pairs(), BT, BRME, stage1=given, checkpoints=tmp_path, progress=False)
    assert heads.single is given
    assert [file.name for file in tmp_path.iterdir()] == ["brme.pt"]


def test_stage_1_is_handed_over_before_stage_2_begins(tmp_path: Path) -> None:
    def stop(head: EnsembleHead) -> None:
        seen.append(head.num_heads)
        raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fit_two_stages(_pairs(), BT, BRME, on_stage1=stop, checkpoints=tmp_path, progress=False)
    assert seen == [1]
    assert not (tmp_path / "brme.pt").exists()
    resumed = fit_two_stages(_pairs(), BT, BRME, checkpoints=tmp_path, progress=False)
    whole = fit_two_stages(_pairs(), BT, BRME, progress=False)
    assert torch.equal(resumed.final.weight, whole.final.weight)


def _difference(value: float) -> tuple[EnsembleHead, Tensor, Tensor]:
    head = EnsembleHead(1, 1, aggregation="mean")
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.zero_()
    return head, torch.tensor([[value]]), torch.zeros(1, 1)


def test_p_hat_is_the_logistic_of_the_difference() -> None:
    p = preference_probability(*_difference(2.0))
    assert p.dtype == torch.float64
    assert float(p) == pytest.approx(1 / (1 + torch.tensor(-2.0, dtype=torch.float64).exp().item()), abs=1e-12)


@pytest.mark.parametrize("difference", [1e4, -1e4, 17.0, 40.0])
def test_a_saturated_p_hat_stays_between_0_and_1_in_float32_too(difference: float) -> None:
    p = preference_probability(*_difference(difference)).float()
    assert 0 < float(p) < 1
    assert abs(float(p) - (difference > 0)) < 2e-7
