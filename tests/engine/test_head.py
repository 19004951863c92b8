"""EnsembleHead: its start, its precision, its calibration, its refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from prudent.engine import Aggregation, EnsembleHead
from prudent.kernels import ensemble_reward


def seeded(hidden_size: int = 64, num_heads: int = 5, **options: object) -> EnsembleHead:
    head = EnsembleHead(hidden_size, num_heads, **options)  # type: ignore[arg-type]
    head.reset_parameters(torch.Generator().manual_seed(0))
    return head


def test_mean_rows_start_with_variance_one_over_width_plus_one_and_std_rows_with_a_hundredth_of_it():
    head = seeded(1023, 64)
    assert head.weight[:64].var().item() == pytest.approx(1 / 1024, rel=0.02)
    assert head.weight[64:].var().item() == pytest.approx(0.01 / 1024, rel=0.02)
    assert not head.bias[:64].any()


def test_a_fresh_head_is_half_sure_and_no_two_heads_agree():
    hidden = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    out = seeded()(hidden)
    assert out.std.mean().item() == pytest.approx(0.5, abs=0.02)
    assert 0.9 < out.mean.std().item() < 1.1
    assert len(torch.unique(out.std.argmin(1))) == 5  # the nominal head is not one and the same everywhere
    assert (torch.corrcoef(out.mean.T) - torch.eye(5)).abs().max() < 0.5


def test_zero_features_give_a_std_of_one_half_plus_the_floor():
    out = EnsembleHead(8, 2, std_floor=0.25)(torch.zeros(1, 8))
    torch.testing.assert_close(out.std, torch.full((1, 2), 0.75))


def test_an_outlying_hidden_state_gives_a_finite_std():
    assert seeded()(torch.full((1, 64), 1e6)).std.isfinite().all()


def test_one_generator_gives_one_head():
    assert torch.equal(seeded().weight, seeded().weight)
    assert not torch.equal(seeded().weight, EnsembleHead(64, 5).weight)


def test_fresh_parameters_forget_the_calibration_of_the_old_ones():
    head = seeded()
    head.shift += 1
    head.scale *= 2
    head.std_ref *= 3
    head.reset_parameters()
    assert head.shift.tolist() == [0] * 5
    assert head.scale.tolist() == head.std_ref.tolist() == [1] * 5


def test_forward_is_the_op_on_the_heads_own_tensors():
    head = seeded(aggregation="tradeoff:0.3,nominal=relative_std", std_floor=0.01)
    generator = torch.Generator().manual_seed(2)
    for buffer in (head.shift, head.scale, head.std_ref):
        buffer.uniform_(0.5, 2, generator=generator)
    hidden = torch.randn(3, 4, 64, generator=generator)
    rows, seed = torch.tensor([11, 0, 5, 5]), torch.tensor([7])
    got = head(hidden, rows, seed, group=2, centre="group")
    want = ensemble_reward(
        hidden, head.weight, head.bias, rows=rows, seed=seed, shift=head.shift, scale=head.scale, std_ref=head.std_ref,
        group=2, aggregation="tradeoff:0.3,nominal=relative_std,centre=group", std_floor=0.01,
    )  # fmt: skip
    for a, b in zip(got[:4], want[:4], strict=True):
        assert torch.equal(a, b)


def test_calibration_moves_means_and_scales_means_and_stds():
    head, hidden = seeded(), torch.randn(6, 64)
    raw = head(hidden)
    head.shift.fill_(0.5)
    head.scale.fill_(4.0)
    out = head(hidden)
    torch.testing.assert_close(out.mean, (raw.mean - 0.5) / 4)
    torch.testing.assert_close(out.std, raw.std / 4)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_model_cast_to_half_precision_keeps_every_bit_of_its_head(cast):
    model = nn.Sequential(nn.Linear(64, 64), seeded())
    model[1].shift.fill_(1 / 3)
    before = copy.deepcopy(model[1].state_dict())
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for name, value in model[1].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert model(torch.randn(2, 64).to(model[0].weight.dtype)).reward.dtype == torch.float32


def test_casting_by_to_and_by_double_then_half_ends_in_fp32():
    head = seeded()
    assert head.to(torch.bfloat16).weight.dtype == torch.float32
    assert head.double().weight.dtype == torch.float64
    assert head.half().weight.dtype == torch.float32


def test_a_double_head_scores_double_features():
    head = seeded().double()
    assert head(torch.randn(2, 64, dtype=torch.float64)).reward.dtype == torch.float64


def test_a_half_precision_default_dtype_does_not_reach_the_head():
    torch.set_default_dtype(torch.bfloat16)
    try:
        head = EnsembleHead(8, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in head.state_dict().values()} == {torch.float32}


def test_autocast_around_the_head_changes_nothing():
    head, hidden = seeded(), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(hidden)
    for a, b in zip(inside[:4], head(hidden)[:4], strict=True):
        assert torch.equal(a, b)


def test_half_precision_features_are_scored_in_fp32():
    head, hidden = seeded(), torch.randn(5, 64).bfloat16()
    torch.testing.assert_close(head(hidden).mean, head(hidden.float()).mean, rtol=0, atol=1e-6)


def test_gradients_reach_weight_and_bias_from_mean_and_std():
    head = seeded()
    out = head(torch.randn(4, 64))
    (out.mean.square().sum() + out.std.sum()).backward()
    assert (head.weight.grad.abs().sum(1) > 0).all()
    assert (head.bias.grad != 0).all()


def test_the_aggregation_is_settable_from_a_string_and_per_call():
    head, hidden = seeded(), torch.randn(4, 64)
    assert head.aggregation == Aggregation("tradeoff", 0.4)
    head.aggregation = "min"
    out = head(hidden)
    assert torch.equal(out.reward, out.mean.min(1).values)
    torch.testing.assert_close(head(hidden, aggregation="mean").reward, out.mean.mean(1))
    assert str(head.aggregation) == "min"


def test_a_single_head_is_a_linear_reward():
    head = EnsembleHead(16, 1, aggregation="mean")
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(head(hidden).reward, hidden @ head.weight[0] + head.bias[0])


def test_state_dict_carries_parameters_and_calibration_through_a_round_trip():
    head = seeded()
    head.shift.fill_(2.0)
    other = EnsembleHead(64, 5)
    other.load_state_dict(head.state_dict())
    hidden = torch.randn(3, 64)
    assert set(head.state_dict()) == {"weight", "bias", "shift", "scale", "std_ref"}
    assert torch.equal(other(hidden).reward, head(hidden).reward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_frozen_copy_gives_the_same_rewards_and_shares_nothing(dtype):
    head = EnsembleHead(6, 3, aggregation="uwo:0.5", std_floor=0.01).to(dtype=dtype)
    head.shift.fill_(1.5)
    head.std_ref.fill_(0.5)
    hidden = torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    copied = head.frozen_copy()
    for ours, theirs in zip(copied(hidden)[:4], head(hidden)[:4], strict=True):
        assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for p in copied.parameters())
    assert head.weight.requires_grad
    before = copied.weight.clone()
    with torch.no_grad():
        head.weight.zero_()
    assert torch.equal(copied.weight, before)


def test_a_meta_head_can_be_given_memory_and_weights_later():
    head = EnsembleHead(8, 2, device="meta").to_empty(device="cpu")
    head.reset_parameters()
    assert head(torch.zeros(1, 8)).std.tolist() == [[pytest.approx(0.501)] * 2]


def test_repr_says_what_it_is():
    assert repr(seeded()) == "EnsembleHead(hidden_size=64, num_heads=5, aggregation='tradeoff:0.4', std_floor=0.001)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads: expected a whole number above 0, got 0"),
        ({"num_heads": 2.0}, "num_heads: expected a whole number"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"std_floor": -1e-3}, "std_floor: expected a finite number >= 0, got -0.001"),
        ({"std_floor": math.nan}, "std_floor"),
        ({"aggregation": "head:5"}, "expected a head below 5"),
        ({"aggregation": "best"}, "kind: expected one of"),
    ],
)
def test_what_makes_no_head_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleHead(**{"hidden_size": 8, **options})


def test_an_aggregation_beyond_the_heads_is_refused_when_set_and_when_called():
    head = EnsembleHead(8, 2)
    with pytest.raises(ValueError, match="head below 2"):
        head.aggregation = "tradeoff:0.4,nominal=head:2"
    with pytest.raises(ValueError, match="head below 2"):
        head(torch.zeros(1, 8), aggregation="head:2")
    assert str(head.aggregation) == "tradeoff:0.4"
