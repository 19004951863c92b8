"""Scoring: every number against the logits of transformers, one trunk pass for reference and reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.engine import EnsembleHead, EnsembleRewardModel, fit_trust
from prudent.rlhf.ppo.batch import Samples, Scored
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.policy.describe import describe_policy
from prudent.rlhf.ppo.policy.policy import Policy, RewardOnTrunk
from prudent.rlhf.ppo.rewards.sources import Rewards
from prudent.rlhf.ppo.score import score

from . import cases
from .cases import SAMPLES, WIDTH, Largest, tiny_lm

STOP, CLOSING = 9, [9, 2]


def settings(**changes: Any) -> PPOConfig:
    return cases.settings(**{"rollout": {"temperature": 0.7}, **changes})


def heads(count: int = 3, aggregation: str = "tradeoff:0.4") -> EnsembleHead:
    head = EnsembleHead(WIDTH, count, aggregation="mean" if count == 1 else aggregation)
    head.reset_parameters(torch.Generator().manual_seed(3))
    return head


def make(reward: RewardOnTrunk | None, lm: Any = None, **changes: Any) -> Policy:
    """A policy some steps on: actor, critic and value head off their start."""
    torch.manual_seed(1)
    policy = Policy(settings(**changes), tiny_lm() if lm is None else lm, device="cpu", reward=reward)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_state().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def scored(policy: Policy, samples: Samples = SAMPLES, reward: Any = None, seed: int | None = None) -> Scored:
    return score(policy, reward, samples, policy.config, closing=CLOSING, seed=seed)


class Fixed:
    """A reward from elsewhere."""

    name, num_heads = "fixed", None

    def __init__(self, *rewards: float) -> None:
        self.rewards = Rewards(torch.tensor(rewards))

    def __call__(self, samples: Samples, seed: int | None = None) -> Rewards:
        return self.rewards


def passes(policy: Policy) -> list[int]:
    """A list that grows by 1 whenever a trunk of the policy runs."""
    counted: list[int] = []
    for model in (policy.model, *([] if policy.frozen is None else [policy.frozen])):
        model.base_model.register_forward_hook(lambda *_: counted.append(1))
    return counted


def by_logits(lm: Any, row: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one response by the model's own logits."""
    prompt, response = SAMPLES.prompts[row], SAMPLES.responses[row]
    with torch.no_grad():
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / temperature
    log_p = logits.log_softmax(-1)
    return log_p.gather(1, torch.tensor(response)[:, None])[:, 0].float(), -(log_p.exp() * log_p).sum(-1).float()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_log_probabilities_and_entropies_are_those_of_the_logits_at_the_sampling_temperature(
    mode: str, packed: bool
) -> None:
    policy = make(RewardOnTrunk(heads()), policy={"mode": mode}, packed=packed)
    experience = scored(policy)
    assert experience.mask.shape == (4, 6)
    for row, response in enumerate(SAMPLES.responses):
        count = len(response)
        logprob, entropy = by_logits(policy.model, row, 0.7)
        torch.testing.assert_close(experience.logprob[row, :count], logprob, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(experience.entropy[row, :count], entropy, rtol=1e-4, atol=1e-4)
        reference, _ = by_logits(tiny_lm(), row, 0.7)
        torch.testing.assert_close(experience.ref_logprob[row, :count], reference, rtol=1e-4, atol=1e-4)
        assert experience.mask[row].tolist() == [i < count for i in range(6)]
        for numbers in (experience.logprob, experience.ref_logprob, experience.entropy, experience.value):
            assert numbers is not None
            assert numbers.dtype == torch.float32
            assert not numbers[row, count:].any()


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_values_are_the_value_head_on_the_state_before_each_token(critic: str) -> None:
    policy = make(RewardOnTrunk(heads()), policy={"critic": critic})
    experience = scored(policy)
    assert policy.value_head is not None
    assert experience.value is not None
    adapters = policy._adapters
    for row, (prompt, response) in enumerate(zip(SAMPLES.prompts, SAMPLES.responses, strict=True)):
        with torch.no_grad(), adapters.using("critic" if critic == "adapter" else "actor"):
            hidden = policy.model.model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        value = policy.value_head(hidden)[:, 0].detach()
        torch.testing.assert_close(experience.value[row, : len(response)], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_shared_rewards_are_those_of_the_reward_model_that_has_the_heads(packed: bool) -> None:
    head = heads()
    experience = scored(make(RewardOnTrunk(head), packed=packed))
    model = EnsembleRewardModel.from_trunk(tiny_lm(), head=head).eval()
    for row, (prompt, response) in enumerate(zip(SAMPLES.prompts, SAMPLES.responses, strict=True)):
        # the stop token gives way to the closing tokens, which a cut answer gets likewise
        said = response[:-1] if SAMPLES.stopped[row] else response
        with torch.no_grad():
            out = model(torch.tensor([prompt + said + CLOSING]))
        assert experience.head_mean is not None
        assert experience.head_std is not None
        assert experience.nominal is not None
        assert experience.worst is not None
        torch.testing.assert_close(experience.reward[row], out.logits[0, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(experience.head_mean[row], out.mean[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(experience.head_std[row], out.std[0], rtol=1e-4, atol=1e-4)
        nominal, worst = experience.nominal[row], experience.worst[row]
        assert nominal == experience.head_mean[row, experience.head_std[row].argmin()]
        assert worst == experience.head_mean[row].min()
        torch.testing.assert_close(experience.reward[row], 0.4 * nominal + 0.6 * worst)


def test_shared_rewards_have_the_distance_and_its_price() -> None:
    head = heads()
    head.set_trust(fit_trust(torch.randn(40, head.hidden_size)))
    free = scored(make(RewardOnTrunk(head)))
    head.aggregation = str(head.aggregation) + ",trust=1"
    priced = scored(make(RewardOnTrunk(head)))
    model = EnsembleRewardModel.from_trunk(tiny_lm(), head=head).eval()
    with torch.no_grad():
        want = model(torch.tensor([SAMPLES.prompts[1] + SAMPLES.responses[1] + CLOSING])).distance
    assert priced.distance is not None
    torch.testing.assert_close(priced.distance[1:2], want, rtol=1e-3, atol=1e-4)
    price = head.trust.unit * priced.distance.square()
    torch.testing.assert_close(free.reward - priced.reward, price, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_reward_of_several_taps_is_read_in_the_same_pass(packed: bool, adapter: bool, tmp_path: Path) -> None:
    taps = ["mean:1", "last:2", "mean:2", "logprob"]
    head = EnsembleHead(3 * WIDTH + 2, 3, aggregation="mean")
    make(None).save(tmp_path)
    policy = make(RewardOnTrunk(head, tmp_path if adapter else None, taps), packed=packed)
    count = passes(policy)
    experience = scored(policy)
    batches = len(count) // (3 if adapter else 2)
    assert len(count) == batches * (3 if adapter else 2)
    with policy._adapters.using("reward" if adapter else None):
        model = EnsembleRewardModel.from_trunk(policy.model, head=head, taps=taps).eval()
        for row, (prompt, response) in enumerate(zip(SAMPLES.prompts, SAMPLES.responses, strict=True)):
            said = response[:-1] if SAMPLES.stopped[row] else response
            with torch.no_grad():
                out = model(torch.tensor([prompt + said + CLOSING]), response_start=torch.tensor([len(prompt)]))
            assert experience.head_mean is not None
            torch.testing.assert_close(experience.head_mean[row], out.mean[0], rtol=1e-4, atol=1e-4)
    assert "reading mean:1, last:2, mean:2, logprob," in describe_policy(policy)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_one_pass_of_the_frozen_trunk_gives_reference_and_rewards(mode: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"policy": {"mode": mode}, "update": {"micro_tokens": 1000}}
    policy = make(RewardOnTrunk(heads()), **options)
    count = passes(policy)
    scored(policy)
    assert len(count) == 2  # reference with rewards, actor with values
    make(None).save(tmp_path)
    policy = make(RewardOnTrunk(heads(), tmp_path), **options)
    count = passes(policy)
    scored(policy)
    assert len(count) == 3  # and the reward's own
    policy = make(None, **{**options, "policy": {"mode": mode, "critic": "adapter"}})
    count = passes(policy)
    scored(policy, reward=Fixed(1.0, 2.0, 3.0, 4.0))
    assert len(count) == 3  # reference, actor, critic


def equal(one: Scored, other: Scored, **tolerance: float) -> None:
    for name, tensor in vars(one).items():
        if isinstance(tensor, Tensor):
            if tolerance:
                torch.testing.assert_close(tensor, getattr(other, name), msg=name, **tolerance)
            else:
                assert torch.equal(tensor, getattr(other, name)), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_results_do_not_depend_on_the_micro_batches_and_equal_calls_give_equal_bits(
    packed: bool, seed: int | None
) -> None:
    """Nor does the noise of sampled rewards: the longest sample, which is read first, keeps its number."""
    results = {}
    for micro in (1, 12, 1000):
        policy = make(RewardOnTrunk(heads()), packed=packed, update={"micro_tokens": micro})
        count = passes(policy)
        results[micro] = scored(policy, seed=seed)
        assert len(count) == {1: 8, 12: 6 if packed else 8, 1000: 2}[micro]
        equal(results[micro], scored(policy, seed=seed))
    equal(results[1], results[1000], rtol=1e-4, atol=1e-5)
    equal(results[12], results[1000], rtol=1e-4, atol=1e-5)


def test_the_worst_head_of_the_batch_is_that_of_the_whole_step() -> None:
    """Equation 6 of BRME: one head for all of a step's samples, however they were cut into forward passes."""
    results = []
    for micro in (1, 1000):
        head = heads(aggregation="batch_worst")
        results.append(scored(make(RewardOnTrunk(head), update={"micro_tokens": micro})))
        mean = results[-1].head_mean
        assert mean is not None
        assert torch.equal(results[-1].reward, mean[:, mean.mean(dim=0).argmin()])
        assert not torch.equal(results[-1].reward, mean.amin(dim=1))
    equal(*results, rtol=1e-4, atol=1e-5)


def test_packed_is_padded_to_rounding() -> None:
    padded, packed = (scored(make(RewardOnTrunk(heads()), packed=packed)) for packed in (False, True))
    equal(padded, packed, rtol=1e-4, atol=1e-5)


def test_one_head_has_no_nominal_and_no_worst() -> None:
    experience = scored(make(RewardOnTrunk(heads(1))))
    assert experience.nominal is None
    assert experience.worst is None
    assert experience.head_mean is not None
    torch.testing.assert_close(experience.reward, experience.head_mean[:, 0])


def test_rewards_from_elsewhere_are_taken_as_they_come_and_without_a_critic_there_are_no_values() -> None:
    options = {"policy": {"critic": "none"}, "update": {"estimator": "rloo"}, "rollout": {"samples_per_prompt": 2}}
    experience = scored(make(None, **options), reward=Fixed(1.0, 2.0, 3.0, 4.0))
    assert experience.reward.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert experience.value is None
    assert experience.head_mean is None


def test_a_reward_that_is_not_finite_is_nan_and_no_error() -> None:
    experience = scored(make(None), reward=Fixed(1.0, float("inf"), float("nan"), -float("inf")))
    assert experience.reward.isnan().tolist() == [False, True, True, True]
    head = heads()
    with torch.no_grad():
        head.bias[1] = float("inf")  # not the nominal head, nor the worst: the row is not to be trusted all the same
    experience = scored(make(RewardOnTrunk(head)))
    assert experience.reward.isnan().all()
    assert experience.logprob.isfinite().all()


def test_the_policy_is_as_it_was_and_nothing_has_a_gradient() -> None:
    policy = make(RewardOnTrunk(heads())).train()
    modes = [module.training for module in policy.modules()]
    experience = scored(policy)
    assert [module.training for module in policy.modules()] == modes
    assert not any(tensor.requires_grad for tensor in vars(experience).values() if isinstance(tensor, Tensor))


def test_a_policy_without_a_reward_of_its_own_needs_a_source() -> None:
    with pytest.raises(ValueError, match="reward: expected a source, because the policy has no reward heads, got none"):
        scored(make(None))
    with pytest.raises(ValueError, match="samples: expected at least one, got none"):
        scored(make(RewardOnTrunk(heads())), Samples([], [], [], []))


def test_nothing_as_large_as_tokens_times_vocabulary_is_made() -> None:
    vocabulary, rows = 20_000, 16 * 40
    samples = Samples([[1, 2]] * 16, [list(range(3, 43))] * 16, [False] * 16, [0] * 16)
    policy = make(RewardOnTrunk(heads()), tiny_lm(vocab_size=vocabulary))
    with Largest() as watch:
        scored(policy, samples)
    assert watch.elements <= 2**20 < rows * vocabulary / 10  # a tile of logits is 4 MiB on a CPU
