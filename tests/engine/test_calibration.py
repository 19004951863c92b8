"""calibrate: the buffers it sets, their effect on the heads, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from prudent.engine import EnsembleHead, calibrate
from prudent.engine import calibration as module


@pytest.fixture
def head() -> EnsembleHead:
    head = EnsembleHead(32, 4)
    head.reset_parameters(torch.Generator().manual_seed(0))
    return head


@pytest.fixture
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(500, 32, generator=generator) + torch.randn(32, generator=generator)


def test_calibrated_means_have_mean_zero_and_sample_std_one_on_the_reference_set(head, features):
    calibrate(head, features)
    mean = head(features).mean
    torch.testing.assert_close(mean.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean.std(0, correction=1), torch.ones(4))


def test_buffers_are_the_statistics_of_the_raw_heads(head, features):
    raw = head(features)
    calibrate(head, features)
    torch.testing.assert_close(head.shift, raw.mean.mean(0))
    torch.testing.assert_close(head.scale, raw.mean.std(0, correction=1))
    torch.testing.assert_close(head.std_ref, raw.std.mean(0) / raw.mean.std(0, correction=1))


def test_std_ref_is_the_mean_calibrated_std(head, features):
    calibrate(head, features)
    torch.testing.assert_close(head.std_ref, head(features).std.mean(0))


def test_relative_std_compares_each_raw_std_with_its_own_mean_whatever_the_scale(head, features):
    with torch.no_grad():
        head.weight[0] *= 100  # one head with a large spread of means: its calibrated std is tiny on every row
    raw = head(features)
    calibrate(head, features)
    chosen = (raw.std / raw.std.mean(0)).argmin(1)
    out = head(features, aggregation="nominal,nominal=relative_std")
    assert torch.equal(out.reward, out.mean.gather(1, chosen[:, None])[:, 0])
    assert (out.std.argmin(1) == 0).all()
    assert len(torch.unique(chosen)) == 4


def test_calibrating_twice_is_calibrating_once(head, features):
    calibrate(head, features)
    once = {name: value.clone() for name, value in head.state_dict().items()}
    calibrate(head, features)
    for name, value in head.state_dict().items():
        assert torch.equal(value, once[name])


def test_weights_are_left_alone_and_no_gradient_is_recorded(head, features):
    weight = head.weight.clone()
    calibrate(head, features.requires_grad_())
    assert torch.equal(head.weight, weight)
    assert not head.shift.requires_grad


def test_blocks_do_not_change_the_statistics(head, features, monkeypatch):
    calibrate(head, features)
    whole = head.scale.clone()
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    calibrate(head, features)
    torch.testing.assert_close(head.scale, whole, rtol=1e-6, atol=0)


def test_half_precision_features_are_taken(head, features):
    calibrate(head, features.bfloat16())
    torch.testing.assert_close(head(features.bfloat16()).mean.std(0), torch.ones(4))


def test_large_offsets_do_not_drown_the_spread(head, features):
    """Means of 1000 with a spread of about 3: a one-pass fp32 variance would lose it."""
    with torch.no_grad():
        head.bias[:4] += 1000.0
    calibrate(head, features)
    torch.testing.assert_close(head(features).mean.std(0), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_are_refused(head, features, rows):
    with pytest.raises(ValueError, match=f"at least 2 rows to measure a spread, got {rows}"):
        calibrate(head, features[:rows])


def test_a_head_without_spread_is_refused_and_named(head, features):
    with torch.no_grad():
        head.weight[2] = 0.0
    with pytest.raises(ValueError, match="same value on all 500 rows from head 2"):
        calibrate(head, features)
    assert head.scale.tolist() == [1.0] * 4


def test_repeated_rows_are_refused(head, features):
    with pytest.raises(ValueError, match="same value on all 9 rows from head 0"):
        calibrate(head, features[:1].expand(9, -1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_row(head, features, bad):
    features[17, 3] = bad
    with pytest.raises(ValueError, match="got 1 rows with others, first row 17, head 0"):
        calibrate(head, features)


def test_another_width_is_refused(head):
    with pytest.raises(ValueError, match=r"expected \[N, 32\], got \[5, 31\]"):
        calibrate(head, torch.zeros(5, 31))
