"""The trust region of a trained reward: fitted in every mode and stage, priced when the config says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from prudent.engine import EnsembleHead, EnsembleRewardConfig, EnsembleRewardModel, Scorer, fit_trust
from prudent.rlhf.data.pairs import both_sides, load_pairs, split_by_prompt
from prudent.rlhf.evaluation.statistics import group_labels
from prudent.rlhf.job.config import load_config
from prudent.rlhf.models.adapter import load_head
from prudent.rlhf.reward.region import distance_blocks, of_heads, place_region, without_price
from prudent.rlhf.reward.train import TrainConfig, run_train

from ..sentiment import write_pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", ("very", "not"))


def _trained(model: Path, data: Path, output: Path, *sets: str) -> Path:
    base = ["eval_fraction=0.25", "brme.num_heads=2"]
    config: Any = load_config(TrainConfig, None, [*base, *sets], model=str(model), data=str(data), output=output)
    run_train(config, progress=False)
    return output


def _check(folder: Path, data: Path, aggregation: str) -> None:
    """The model in `folder` has the region of its own features of the training pairs, and the aggregation."""
    model = EnsembleRewardModel.from_pretrained(folder)
    train, _ = split_by_prompt(load_pairs(data).pairs, 0.25, 0)
    features = Scorer(model, AutoTokenizer.from_pretrained(folder), progress=False).features(both_sides(train))
    labels = group_labels(pair.prompt_key for pair in train).repeat(2)
    want = fit_trust(features, prompts=labels, head=model.score, blocks=distance_blocks(model.config))
    for name, got, expected in zip(want._fields, model.score.trust, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=name)
    assert str(model.score.aggregation) == aggregation


def test_both_stages_on_a_frozen_trunk_have_the_region(tiny_chat_folder: Path, data: Path, tmp_path: Path) -> None:
    run = _trained(tiny_chat_folder, data, tmp_path / "run", "mode=head", "aggregation=lcb:1,trust=2")
    _check(run / "model", data, "lcb:1,trust=2")
    _check(run / "stage1", data, "mean")


def test_a_single_head_takes_the_price_alone(tiny_chat_folder: Path, data: Path, tmp_path: Path) -> None:
    sets = ("mode=head", "stage=bt", "aggregation=lcb:1,trust=3,from=1,power=1")
    _check(_trained(tiny_chat_folder, data, tmp_path / "run", *sets) / "model", data, "trust:3,from=1,power=1")


def test_pet_trains_the_reward_without_the_price_and_saves_it_with_it(
    tiny_chat_folder: Path, data: Path, tmp_path: Path
) -> None:
    sets = ("mode=head", "stage=pet", "aggregation=trust:1", "pet.samples=2", "pet.max_new_tokens=3", "pet.prompts=2")
    _check(_trained(tiny_chat_folder, data, tmp_path / "run", *sets) / "model", data, "trust:1")


@pytest.mark.slow
def test_a_trained_trunk_and_its_adapter_have_the_region(tiny_chat_folder: Path, data: Path, tmp_path: Path) -> None:
    run = _trained(
        tiny_chat_folder, data, tmp_path / "run", "mode=lora", "aggregation=min,trust=1", "trunk.max_steps=2"
    )
    _check(run / "model", data, "min,trust=1")
    mine, adapter = EnsembleRewardModel.from_pretrained(run / "model").score, load_head(run / "adapter")
    for one, other in zip(mine.trust, adapter.trust, strict=True):
        assert torch.equal(one, other)


def test_too_few_responses_give_no_region_and_no_price(caplog: pytest.LogCaptureFixture) -> None:
    head, config = EnsembleHead(8, 2), EnsembleRewardConfig()
    sides = torch.randn(2, 9, 8).unbind()
    with caplog.at_level(logging.WARNING):
        place_region(config, head, sides, range(9))
    assert head.trust is None
    assert "expected at least 20 training responses for a trust region, got 18: the model measures no" in caplog.text
    with pytest.raises(ValueError, match=r"^aggregation: expected at least 20 .* 'lcb:1,trust=1' has no distance"):
        place_region(config, head, sides, range(9), "lcb:1,trust=1")


def test_a_wide_models_distance_reads_the_means_over_the_response(tiny_chat_folder: Path) -> None:
    trunk = AutoConfig.from_pretrained(tiny_chat_folder)
    config, head = EnsembleRewardConfig(trunk, taps=["last:-1", "mean:1"]), EnsembleHead(64, 2)
    place_region(config, head, torch.randn(2, 30, 64).unbind(), range(30))
    assert head.trust is not None
    assert not head.trust.precision[:32].any()
    assert not head.trust.directions[:, :32].any()
    assert bool((head.trust.precision[32:] > 0).all())


def test_one_head_keeps_the_price_and_a_head_in_training_has_none() -> None:
    assert str(of_heads("tradeoff:0.4,trust=1,from=0.5", 1)) == "trust:1,from=0.5"
    assert str(of_heads("tradeoff:0.4", 1)) == "mean"
    assert str(of_heads("tradeoff:0.4,trust=1", 5)) == "tradeoff:0.4,trust=1"
    assert without_price("lcb:1,trust=1,power=4") == "lcb:1"
