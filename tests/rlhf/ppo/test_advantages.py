"""Rewards become advantages: each step by hand; one bad sample changes no other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import prudent
from prudent.rlhf.ppo.advantages import KLController, shape
from prudent.rlhf.ppo.batch import Experience, Samples, Scored, response_mask
from prudent.rlhf.ppo.config import KLConfig, PPOConfig

LENGTHS = (3, 1, 2, 4, 2, 2)  # six samples, three of each of two prompts
STOPPED = [True, False, True, True, False, True]


def a_config(**given: Any) -> PPOConfig:
    reward = {"source": "none", **given.pop("reward", {})}
    base = {"model": "tiny", "prompts": "none", "output": "run", "rollout": {"samples_per_prompt": 3}}
    return PPOConfig.model_validate({**base, "reward": reward, **given})


def some_scored(reward: list[float] | None = None, critic: bool = True, prompts: tuple[int, ...] = (7, 2)) -> Scored:
    generator = torch.Generator().manual_seed(0)
    samples = Samples([[1, 2]] * 6, [[3] * length for length in LENGTHS], STOPPED, [prompts[0]] * 3 + [prompts[1]] * 3)
    mask = response_mask(samples, "cpu")

    def table() -> Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask

    logprob, ref_logprob, entropy, value = table(), table(), table(), table()
    rewards = torch.tensor(reward or [1.0, 2.0, 6.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    return Scored(samples, mask, logprob, ref_logprob, entropy, value if critic else None, rewards)


def scores(experience: Experience) -> list[float]:
    return experience.score.tolist()


def per_row(experience: Experience) -> list[float]:
    """The advantage of each row's first token, having made sure that the row's others are the same."""
    first = experience.advantage[:, :1]
    assert torch.equal(experience.advantage, first * experience.mask)
    return first[:, 0].tolist()


# score


def test_a_reward_is_its_own_score_by_default() -> None:
    experience = some_scored()
    assert scores(shape(experience, a_config(), 0.0)) == experience.reward.tolist()


def test_the_penalty_is_taken_off_cut_answers_then_clipped_then_centred() -> None:
    penalised = shape(some_scored(), a_config(reward={"missing_eos_penalty": 3.0}), 0.0)
    assert scores(penalised) == [1.0, -1.0, 6.0, -1.0, -2.5, 2.0]
    clipped = shape(some_scored(), a_config(reward={"missing_eos_penalty": 3.0, "clip": 2.0}), 0.0)
    assert scores(clipped) == [1.0, -1.0, 2.0, -1.0, -2.0, 2.0]
    both = {"missing_eos_penalty": 3.0, "clip": 2.0, "centre": "group"}
    centred = shape(some_scored(), a_config(reward=both), 0.0)
    thirds = [1 - 2 / 3, -1 - 2 / 3, 2 - 2 / 3, -1 + 1 / 3, -2 + 1 / 3, 2 + 1 / 3]
    assert scores(centred) == pytest.approx(thirds, rel=1e-12)


def test_centring_is_over_what_is_kept() -> None:
    experience = some_scored([1.0, 2.0, math.nan, -1.0, math.inf, 2.0])
    batch = scores(shape(experience, a_config(reward={"centre": "batch"}), 0.0))
    assert [batch[i] for i in (0, 1, 3, 5)] == [0.0, 1.0, -2.0, 1.0]
    group = scores(shape(experience, a_config(reward={"centre": "group"}), 0.0))
    assert [group[i] for i in (0, 1, 3, 5)] == [-0.5, 0.5, -1.5, 1.5]
    assert math.isnan(batch[2])
    assert math.isnan(batch[4])


# advantages


def test_rloo_by_hand() -> None:
    config = a_config(update={"estimator": "rloo"})
    out = shape(some_scored(critic=False), config, 0.0)
    expected = [1 - 4.0, 2 - 3.5, 6 - 1.5, -1 - 1.25, 0.5 - 0.5, 2 - (-0.25)]
    assert per_row(out) == pytest.approx(expected, rel=1e-12)
    assert out.returns is None


def test_rloo_takes_the_sequences_kl_off_before_the_baseline() -> None:
    config, experience = a_config(update={"estimator": "rloo"}), some_scored(critic=False)
    kl = (experience.logprob - experience.ref_logprob).sum(1)
    s = (experience.reward - 0.3 * kl).tolist()
    expected = [s[i] - sum(s[j] for j in range(6) if j // 3 == i // 3 and j != i) / 2 for i in range(6)]
    assert per_row(shape(experience, config, 0.3)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_the_kl_penalty_uses_the_chosen_estimator(estimator: str) -> None:
    experience = some_scored(critic=False)
    config = a_config(update={"estimator": "rloo"}, kl={"estimator": estimator})
    d = experience.logprob - experience.ref_logprob
    price = {"k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d, "abs": d.abs()}[estimator]
    s = (experience.reward - 0.3 * (price * experience.mask).sum(1)).view(2, 3)
    expected = (s - (s.sum(1, keepdim=True) - s) / 2).flatten().tolist()
    assert per_row(shape(experience, config, 0.3)) == pytest.approx(expected, rel=1e-11)


def test_group_relative_equals_trls() -> None:
    config, experience = a_config(update={"estimator": "group"}), some_scored(critic=False)
    grouped = experience.reward.view(2, 3)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)  # grpo_trainer.py
    assert per_row(shape(experience, config, 0.0)) == pytest.approx(expected.flatten().tolist(), rel=1e-12)


def test_a_group_of_equal_rewards_has_no_advantage() -> None:
    experience = some_scored([0.1] * 6, critic=False)
    for estimator in ("rloo", "group"):
        found = per_row(shape(experience, a_config(update={"estimator": estimator}), 0.0))
        assert found == pytest.approx([0.0] * 6, abs=1e-11)


def test_gae_equals_prudent_advantages() -> None:
    experience = some_scored()
    out = shape(experience, a_config(update={"gamma": 0.9, "lam": 0.8}, kl={"estimator": "k3"}), 0.3)
    expected = prudent.advantages(
        experience.reward,
        experience.logprob,
        experience.ref_logprob,
        experience.value,
        experience.mask,
        gamma=0.9,
        lam=0.8,
        kl_coef=0.3,
        kl_estimator="k3",
    )
    assert torch.equal(out.advantage, expected.advantage)
    assert torch.equal(out.returns, expected.returns)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "group"])
def test_kl_in_the_loss_is_not_in_the_reward(estimator: str) -> None:
    experience = some_scored()
    config = a_config(update={"estimator": estimator}, kl={"place": "loss"})
    priced, free = shape(experience, config, 0.3), shape(experience, config, 0.0)
    assert torch.equal(priced.advantage, free.advantage)


@pytest.mark.parametrize(("estimator", "usual"), [("gae", True), ("rloo", False), ("group", False)])
def test_whitening_is_over_tokens_and_the_default_for_gae_alone(estimator: str, usual: bool) -> None:
    experience = some_scored()

    def advantage(whiten: bool | None) -> Tensor:
        out = shape(experience, a_config(update={"estimator": estimator, "whiten": whiten}), 0.1)
        return out.advantage[experience.mask]

    plain, white = advantage(False), advantage(True)
    torch.testing.assert_close(white, (plain - plain.mean()) / (plain.var() + 1e-8).sqrt(), rtol=1e-11, atol=1e-12)
    assert torch.equal(advantage(None), white if usual else plain)


def test_a_group_is_a_prompt_whatever_its_number() -> None:
    config = a_config(update={"estimator": "rloo"})
    first, other = (per_row(shape(some_scored(prompts=pair), config, 0.1)) for pair in ((0, 1), (900, 3)))
    assert first == other


# what is not finite


@pytest.mark.parametrize("estimator", ["rloo", "group"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_reward_is_dropped_and_its_group_is_not(estimator: str, bad: float) -> None:
    config = a_config(update={"estimator": estimator})
    out = shape(some_scored([1.0, bad, 6.0, -1.0, 0.5, 2.0], critic=False), config, 0.0)
    assert out.dropped.tolist() == [False, True, False, False, False, False]
    found = per_row(out)
    half = 2.5 / (math.sqrt(12.5) + 1e-4)  # rewards 1 and 6: mean 3.5, std sqrt(12.5)
    expected = [-5.0, 0.0, 5.0] if estimator == "rloo" else [-half, 0.0, half]
    assert found[:3] == pytest.approx(expected, rel=1e-12)
    assert found[3:] == per_row(shape(some_scored(critic=False), config, 0.0))[3:]


@pytest.mark.parametrize("estimator", ["rloo", "group"])
def test_a_sample_left_alone_in_its_group_gets_0_and_is_kept(estimator: str) -> None:
    out = shape(
        some_scored([math.nan, 2.0, math.nan, -1.0, 0.5, 2.0], critic=False),
        a_config(update={"estimator": estimator}),
        0.0,
    )
    assert out.dropped.tolist() == [True, False, True, False, False, False]
    assert per_row(out)[1] == 0.0
    assert scores(out)[1] == 2.0


@pytest.mark.parametrize("estimator", ["gae", "rloo", "group"])
@pytest.mark.parametrize("name", ["logprob", "ref_logprob", "value"])
def test_a_table_that_is_not_finite_drops_its_row(estimator: str, name: str) -> None:
    experience = some_scored()
    getattr(experience, name)[3, 1] = math.nan
    out = shape(experience, a_config(update={"estimator": estimator}), 0.1)
    assert out.dropped.tolist() == [False, False, False, True, False, False]
    assert torch.isfinite(out.advantage).all()
    assert (out.advantage[3] == 0).all()
    assert (out.advantage[[0, 1, 2, 4, 5]][experience.mask[[0, 1, 2, 4, 5]]] != 0).any()


def test_entries_without_a_token_are_not_read() -> None:
    experience = some_scored()
    before = shape(experience, a_config(), 0.1)
    for table in (experience.logprob, experience.ref_logprob, experience.value):
        assert table is not None
        table[~experience.mask] = math.nan
    after = shape(experience, a_config(), 0.1)
    for name in ("score", "advantage", "returns", "kl", "dropped"):
        assert torch.equal(getattr(after, name), getattr(before, name))


def test_gae_without_values_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^update.estimator: expected rloo or group without a critic's values, got gae$"
    ):
        shape(some_scored(critic=False), a_config(), 0.0)


# what comes back


def test_scored_samples_are_not_changed_and_dtypes_are_kept() -> None:
    scored = some_scored()
    narrow = {name: getattr(scored, name).float() for name in ("logprob", "ref_logprob", "value", "reward")}
    scored = dataclasses.replace(scored, **narrow)
    before = {name: value.clone() for name, value in vars(scored).items() if isinstance(value, Tensor)}
    for estimator in ("gae", "rloo", "group"):
        out = shape(scored, a_config(update={"estimator": estimator}, reward={"centre": "batch"}), 0.1)
        assert all(torch.equal(getattr(scored, name), value) for name, value in before.items())
        assert out.score.dtype == out.advantage.dtype == torch.float32
        assert out.kl.tolist() == pytest.approx((scored.logprob - scored.ref_logprob).sum(1).tolist(), rel=1e-6)


# the KL coefficient


def test_the_controller_follows_the_paper() -> None:
    controller = KLController(0.1, target=6.0, horizon=1000)
    assert controller.update(6.6, 64) == pytest.approx(0.1 * (1 + 0.1 * 0.064), rel=1e-12)
    assert controller.update(600.0, 64) == pytest.approx(0.1 * (1 + 0.1 * 0.064) * (1 + 0.2 * 0.064), rel=1e-12)
    before = controller.coef
    assert controller.update(0.0, 500) == pytest.approx(before * 0.9, rel=1e-12)


def test_the_controller_reaches_its_target() -> None:
    """A policy whose KL is 2 / coef: the coefficient that gives 5 nats is 0.4."""
    controller = KLController(0.05, target=5.0, horizon=500)
    for _ in range(400):
        controller.update(2 / controller.coef, 64)
    assert controller.coef == pytest.approx(0.4, rel=1e-6)


def test_the_coefficient_stays_without_a_target_and_at_a_kl_that_is_not_finite() -> None:
    assert KLController(0.1).update(50.0, 64) == 0.1
    controller = KLController(0.1, target=5.0)
    assert controller.update(math.nan, 64) == 0.1
    assert controller.update(math.inf, 64) == 0.1


def test_in_the_loss_the_estimator_is_k2_unless_another_is_asked_for() -> None:
    assert KLConfig().estimator == "k1"
    assert KLConfig.model_validate({"place": "loss"}).estimator == "k2"
    assert KLConfig.model_validate({"place": "loss", "estimator": "k1"}).estimator == "k1"
    config = a_config(kl={"place": "loss"})
    assert PPOConfig.model_validate(config.model_dump()) == config
