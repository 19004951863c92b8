"""`prudent study toy`: the world it builds, PPO that finds the truth if it is the reward, and reproducible results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prudent.rlhf.job.config import load_config
from prudent.rlhf.study.toy import ToyConfig, arms, run_toy, train_arms
from prudent.rlhf.study.toy_report import findings
from prudent.rlhf.study.toy_world import SIZE, ToyRewardConfig, draw, normalised, preference_pairs, reward_models, right


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_each_prompts_own_response_meets_two_different_others() -> None:
    pairs = preference_pairs(50, torch.Generator().manual_seed(0))
    prompt, chosen, rejected = pairs.unbind(2)
    assert pairs.shape == (50, 16, 3)
    assert torch.equal(prompt, chosen)
    assert bool((rejected != prompt).all())
    first, second = rejected.view(50, SIZE, 2).unbind(2)
    assert bool((first != second).all())
    assert rejected.unique().numel() == SIZE


def test_reward_models_rank_their_pairs_right_and_differ_where_no_label_is() -> None:
    pairs = preference_pairs(2, torch.Generator().manual_seed(0))
    rewards, ranked = reward_models(pairs, 3, ToyRewardConfig(steps=300), torch.Generator().manual_seed(1))
    assert rewards.shape == (2, 3, SIZE, SIZE)
    assert float(ranked.min()) == 1.0
    cell = rewards[:, :, 0, 1]
    assert float((cell[:, 0] - cell[:, 1]).abs().min()) > 1e-3


def test_a_models_training_does_not_depend_on_the_models_beside_it() -> None:
    """The batch of networks is one loss; Adam and the scaling keep each network's own steps."""
    pairs = preference_pairs(1, torch.Generator().manual_seed(0))
    config = ToyRewardConfig(steps=20)
    alone, _ = reward_models(pairs, 1, config, torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    doubled = pairs.repeat(3, 1, 1)
    generator = torch.Generator().manual_seed(1)
    # the same first network: uniform draws fill [count, in, out] in order, layer by layer, so only count 1 repeats it
    again, _ = reward_models(doubled[:1], 1, config, generator)
    torch.testing.assert_close(alone, again, rtol=0, atol=0)


def test_normalisation_takes_off_what_bradley_terry_leaves_open() -> None:
    rewards = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 5 + 2
    assert normalised(rewards, "none") is rewards
    torch.testing.assert_close(normalised(rewards, "prompt").mean(-1), torch.zeros(2, 3, SIZE), atol=1e-5, rtol=0)
    whole = normalised(rewards, "model").flatten(2)
    torch.testing.assert_close(whole.std(-1), torch.ones(2, 3))


def test_draws_follow_the_policy() -> None:
    probability = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]).expand(1, SIZE, SIZE).contiguous()
    drawn = draw(probability, torch.rand(1, SIZE, 20_000, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(drawn.flatten(), minlength=SIZE) / drawn.numel()
    torch.testing.assert_close(share, probability[0, 0], atol=0.005, rtol=0)


def test_arms_read_the_models_as_the_paper_does() -> None:
    rewards = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    table = arms(rewards, 0.4)
    nominal, others = rewards[:, 0], rewards[:, 1:]
    assert torch.equal(table["tradeoff:0.4"].table, 0.4 * nominal + 0.6 * others.amin(1))
    assert torch.equal(table["tradeoff:0.4, nominal in the set"].table, 0.4 * nominal + 0.6 * rewards.amin(1))
    assert torch.equal(arms(rewards, 1.0)["tradeoff:1"].table, nominal)
    assert int(right(table["the truth"].table).min()) == SIZE


def test_ppo_finds_the_truth_when_it_is_told() -> None:
    """The control: what fails in other arms is not PPO."""
    config = ToyConfig(seeds=4)
    rewards = torch.randn(4, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    every = arms(rewards, 0.4)
    results, policies = train_arms({name: every[name] for name in ("single", "the truth")}, rewards[:, 1:], config)
    assert results["the truth"]["optimal"] == 4
    assert float(policies["the truth"].diagonal(dim1=1, dim2=2).min()) > 0.5


def test_the_worst_model_of_eq_6_is_one_model_for_the_whole_policy() -> None:
    """With one model in the set there is nothing to choose, and eq. 6 is the trade-off with it."""
    config = ToyConfig(seeds=2, policy={"steps": 20})
    rewards = torch.randn(2, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    _, policies = train_arms(arms(rewards, 0.4), rewards[:, 1:], config)
    torch.testing.assert_close(policies["tradeoff:0.4, one worst model (eq. 6)"], policies["tradeoff:0.4"])


def test_the_study_writes_table_numbers_and_picture_and_repeats_itself(tmp_path: Path) -> None:
    quick = {"reward": {"steps": 30}, "policy": {"steps": 10}, "sensitivity": False}
    first = run_toy(ToyConfig(output=tmp_path / "a", seeds=3, **quick), progress=False)
    second = run_toy(ToyConfig(output=tmp_path / "b", seeds=3, **quick), progress=False)
    for name in ("toy.json", "toy.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "toy.png").stat().st_size > 10_000
    metrics = json.loads((tmp_path / "a" / "toy.json").read_text())
    assert set(metrics["lambda"]) == {"0", "0.2", "0.4", "0.6", "0.8", "1"}
    assert metrics["lambda"]["1"]["right_by_seed"] == metrics["arms"]["single"]["right_by_seed"]
    assert "The paper's picture, a single model that fails" in str(first)
    assert first.metrics == second.metrics


@pytest.mark.parametrize(
    ("gain", "says"), [(1, "pessimism helps"), (-1, "pessimism costs"), (0, "no difference shown")]
)
def test_the_sentences_follow_the_intervals(gain: int, says: str, tmp_path: Path) -> None:
    quick = {"reward": {"steps": 2}, "policy": {"steps": 1}, "sensitivity": False}
    metrics = run_toy(ToyConfig(output=tmp_path, seeds=2, **quick), progress=False).metrics
    metrics["arms"]["tradeoff:0.4"]["right_minus_single"] = [gain, gain - 0.5, gain + 0.5]
    assert says in " ".join(findings(metrics))


def test_a_wrong_setting_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"reward\.activation: expected 'tanh' or 'relu', got \"gelu\""):
        load_config(ToyConfig, None, ["reward.activation=gelu"])
