"""The two-stage recipe: what stage 1 hands to stage 2, what is returned, where it may stop and begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prudent.engine import EnsembleHead
from prudent.rlhf.job.log import RunLog, read_metrics
from prudent.rlhf.reward.config import BradleyTerryConfig, BRMEConfig
from prudent.rlhf.reward.convex import RidgeFit, fit_ridge
from prudent.rlhf.reward.fit import PairFeatures, fit_heads
from prudent.rlhf.reward.two_stage import fit_two_stages, preference_probability

BT, BRME = BradleyTerryConfig(solver="adamw", epochs=3, lr=0.03, seed=1), BRMEConfig(epochs=2, num_heads=2, seed=2)


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


NEWTON = BradleyTerryConfig(solver="newton", l2=(1e-3, 1e-2, 1e-1), folds=4, seed=1)


def test_stage_1_may_be_solved_exactly(tmp_path: Path) -> None:
    pairs = _pairs()._replace(prompts=torch.arange(60) // 5)
    fits: list[RidgeFit] = []
    with RunLog(tmp_path) as log:
        heads = fit_two_stages(
            pairs, NEWTON, BRME, seed=5, evaluation=pairs, on_fit=fits.append, log=log, progress=False
        )
    assert pairs.prompts is not None
    ours = fit_ridge(pairs.chosen, pairs.rejected, pairs.prompts, margin=pairs.margin, grid=NEWTON.l2, folds=4, seed=6)
    assert torch.equal(heads.single.weight, ours.head.weight)
    assert fits[0].curve == ours.curve
    rows = [row for row in read_metrics(tmp_path) if any(key.startswith("bt/") for key in row)]
    assert [row["bt/fit_l2"] for row in rows[:-1]] == [point.l2 for point in ours.curve]
    assert rows[0]["bt/fit_log_loss"] == ours.curve[0].log_loss
    assert rows[-1]["bt/l2"] == ours.l2
    assert rows[-1]["bt/loss"] == ours.log_loss == pytest.approx(rows[-1]["bt/eval_loss"], rel=1e-5)
    assert 0.5 < rows[-1]["bt/eval_accuracy_mean"] <= 1


def test_an_exact_stage_1_needs_prompts_and_refuses_what_it_does_not_read() -> None:
    with pytest.raises(ValueError, match=r"prompts: expected labels of the pairs for bt\.solver newton"):
        fit_two_stages(_pairs(), NEWTON, None, progress=False)
    pairs = _pairs()._replace(prompts=torch.arange(60))
    for change, message in (
        ({"lr": 0.1}, r"bt\.lr: has no effect with bt\.solver newton: set bt\.solver to adamw"),
        ({"bsr_scope": "global"}, r"bt\.bsr_scope: has no effect with bt\.solver newton"),
        (
            {"bsr": 0.001},
            r"bt\.bsr: expected 0 with bt\.solver newton, because batch-sum .* got 0\.001: set",
        ),
        ({"solver": "adamw"}, r"bt\.l2: has no effect with bt\.solver adamw: set bt\.solver to newton"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_two_stages(pairs, NEWTON.model_copy(update=change), None, progress=False)
