"""A trust region in the head, the saved model and the scorer."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from prudent.engine import EnsembleHead, EnsembleRewardConfig, EnsembleRewardModel, Scorer, calibrate, fit_trust

WIDTH = 32
REFUSED = "expected a model with a trust region for 'trust:1'.*prudent calibrate --model DIR --data FILE"


def reference(rows: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def fitted(num_heads: int = 3, directions: int = 4, **options: str) -> EnsembleHead:
    head = EnsembleHead(WIDTH, num_heads, **options)
    head.reset_parameters(torch.Generator().manual_seed(0))
    head.set_trust(fit_trust(reference(), directions=directions, head=head))
    return head


def test_a_head_without_a_region_has_no_distance_and_saves_nothing_of_one():
    head = EnsembleHead(WIDTH, 3)
    assert head.trust is None
    assert head(reference()).distance is None
    assert not [name for name in head.state_dict() if "trust" in name]


def test_with_a_region_every_call_gives_the_distance_and_a_price_takes_its_units():
    head, features = fitted(), 1.5 * reference(seed=1)
    plain, priced = head(features, aggregation="mean"), head(features, aggregation="trust:2,from=1,power=1")
    assert torch.equal(plain.distance, priced.distance)
    assert float((plain.distance > 1).float().mean()) > 0.5
    want = plain.reward - 2 * head.trust.unit * (plain.distance - 1).clamp_min(0)
    torch.testing.assert_close(priced.reward, want)


def test_a_price_without_a_region_is_refused_where_rewards_are_asked_for():
    with pytest.raises(ValueError, match=REFUSED):
        EnsembleHead(WIDTH, 3)(reference(), aggregation="trust:1")
    with pytest.raises(ValueError, match=REFUSED):
        EnsembleHead(WIDTH, 3, aggregation="trust:1")(reference())


def test_fresh_parameters_have_no_region():
    head = fitted()
    head.reset_parameters()
    assert head.trust is None


def test_a_copy_has_the_region_and_the_state_loads_into_a_fresh_head_of_any_rank():
    head, features = fitted(), reference(seed=1)
    others = [head.frozen_copy(), copy.deepcopy(head), EnsembleHead(WIDTH, 3), fitted(directions=7)]
    for other in others[2:]:
        other.load_state_dict(head.state_dict())
    for other in others:
        assert torch.equal(other(features).distance, head(features).distance)
    others[0].trust.mean.add_(1)
    assert not torch.equal(others[0].trust.mean, head.trust.mean)


def test_a_cast_to_half_precision_keeps_every_bit_and_a_cast_to_double_follows():
    head = fitted()
    before = [tensor.clone() for tensor in head.trust]
    head.to(torch.bfloat16)
    for old, new in zip(before, head.trust, strict=True):
        assert torch.equal(old, new)
    assert head.double()(reference().double()).distance.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(5)}, r"mean: expected \[32\], got \[5\]"),
        ({"directions": torch.zeros(3, WIDTH)}, r"directions: expected \[4, 32\], got \[3, 32\]"),
        ({"precision": torch.full((WIDTH,), -1.0)}, "precision: expected finite numbers, got -1"),
        ({"unit": torch.zeros(1)}, "unit: expected finite numbers above 0, got 0"),
        ({"weights": torch.full((4,), math.nan)}, "weights: expected finite numbers, got nan"),
    ],
)
def test_a_region_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    head = fitted()
    region = head.trust
    with pytest.raises(ValueError, match=f"set_trust: {message}"):
        head.set_trust(region._replace(**change))
    assert all(torch.equal(one, other) for one, other in zip(region, head.trust, strict=True))


def test_calibration_carries_the_unit_to_the_new_scale():
    head, features = fitted(), reference()
    calibrate(head, features)
    want = fit_trust(features, directions=4, head=head).unit
    torch.testing.assert_close(head.trust.unit, want)


@pytest.fixture
def model(tiny_trunk):
    return EnsembleRewardModel.from_trunk(tiny_trunk(), head=fitted(aggregation="lcb:1,trust=1"))


IDS = torch.arange(3, 23).view(2, 10)


@torch.no_grad()
def test_the_saved_model_has_the_region_and_gives_the_same_distances(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = EnsembleRewardModel.from_pretrained(tmp_path)
    assert loaded.config.trust_directions == 4
    for one, other in zip(model.score.trust, loaded.score.trust, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(loaded(IDS).distance, model(IDS).distance)
    assert [tuple(part.shape) for part in loaded(IDS, return_dict=False)] == [(2, 1), (2, 3), (2, 3), (2,)]
    # and once more, without the region
    loaded.score.set_trust(None)
    loaded.score.aggregation = "mean"
    loaded.save_pretrained(tmp_path)
    again = EnsembleRewardModel.from_pretrained(tmp_path)
    assert again.score.trust is None
    assert again(IDS).distance is None


@torch.no_grad()
def test_a_folder_from_before_there_were_regions_loads(model, tmp_path):
    model.score.set_trust(None)
    model.score.aggregation = "lcb:1"
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("trust_directions", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert EnsembleRewardModel.from_pretrained(tmp_path)(IDS).distance is None


def test_a_checkpoint_that_lacks_a_part_of_its_region_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["score.trust_weights"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected every tensor of the model .* got none for score.trust_weights"):
        EnsembleRewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrong", [-1, 2.0, True])
def test_the_configuration_refuses_another_number_of_directions(wrong):
    with pytest.raises(ValueError, match="trust_directions: expected a whole number, 0 or above, got"):
        EnsembleRewardConfig(trust_directions=wrong)


@torch.no_grad()
def test_the_scorer_gives_the_distance_and_takes_the_price_once(model, make_tokenizer):
    model.score.trust.mean.copy_(model(IDS).mean.new_zeros(WIDTH))
    items = [row.tolist() for row in IDS]
    scorer = Scorer(model, make_tokenizer(), progress=False)
    scores, direct = scorer.score(items), model(IDS)
    torch.testing.assert_close(scores.distance, direct.distance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(scores.reward), direct.logits[:, 0], rtol=1e-4, atol=1e-4)
    free = scorer.score(items, aggregation="lcb:1")
    price = torch.tensor(free.reward) - torch.tensor(scores.reward)
    torch.testing.assert_close(price, model.score.trust.unit * scores.distance.square(), rtol=1e-4, atol=1e-4)
    assert (free.nominal, free.worst) == (scores.nominal, scores.worst)


def test_the_scorer_refuses_a_price_before_it_reads_a_text(model, make_tokenizer):
    model.score.set_trust(None)
    with pytest.raises(ValueError, match=REFUSED):
        Scorer(model, make_tokenizer(), progress=False).score([""], aggregation="trust:1")
    model.score.aggregation = "mean"
    assert Scorer(model, make_tokenizer(), progress=False).score(["a"]).distance is None
