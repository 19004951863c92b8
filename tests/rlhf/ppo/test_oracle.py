"""PPO against an independent oracle: a tabular policy, every response enumerated, closed forms in fp64.

The policy's probabilities are quarters, so a finite set of samples *is* its distribution: each response of at most T
tokens as often as its probability times 4^T says. A mean over the set is then an expectation, and the results of
`shape` and `update` are compared with formulas that have no ratios, clips, masks or micro-batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.rlhf.ppo.advantages import leave_one_out, shape
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.losses import chi2_estimate, chi2_price, kl_estimate

from .oracle import (
    PROMPTS,
    State,
    World,
    a_config,
    a_world,
    close,
    exact_values,
    gradient,
    scored,
    update_gradient,
    whole_distribution,
)

# the policy gradient


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_ppos_first_update_descends_the_gradient_of_the_objective(lam: float, kl_coef: float) -> None:
    """J = E r - kl_coef KL(pi || pi_ref), differentiated by enumeration; with the exact critic GAE is unbiased at any
    lambda."""
    world, config = a_world(), a_config({"lam": lam})
    value = exact_values(world, kl_coef)
    with torch.no_grad():
        world.policy.value.copy_(value)
    shaped = shape(scored(world, whole_distribution(world), value), config, kl_coef)
    found, _ = update_gradient(world, shaped, config)

    def gain(prompt: int, response: tuple[int, ...]) -> Tensor:
        logp, ref = (torch.stack(policy.tokens(prompt, response)).sum() for policy in world[:2])
        return world.reward[(prompt, *response)] - kl_coef * (logp - ref.detach())

    close(found, -gradient(world.policy.expectation(gain), world.policy))
    assert found.abs().max() > 0.01


def test_a_wrong_critic_changes_the_noise_and_not_the_gradient_at_lambda_1_but_does_below() -> None:
    world = a_world()
    wrong = torch.linspace(-2, 2, len(world.policy.number), dtype=torch.float64)
    exact = -gradient(world.policy.expectation(lambda p, y: world.reward[(p, *y)]), world.policy)
    found = {}
    for lam in (1.0, 0.5):
        config = a_config({"lam": lam})
        shaped = shape(scored(world, whole_distribution(world), wrong), config, 0.0)
        found[lam], _ = update_gradient(world, shaped, config)
    close(found[1.0], exact)
    assert (found[0.5] - exact).abs().max() > 0.01


def test_the_critic_descends_the_mean_squared_error_of_its_returns() -> None:
    """At lambda 1 a return's mean is the exact value: the gradient at V is visits * (V - V_exact) * value_coef."""
    world, config = a_world(), a_config({"lam": 1.0, "value_coef": 0.7})
    value = torch.linspace(-1, 1, len(world.policy.number), dtype=torch.float64)
    with torch.no_grad():
        world.policy.value.copy_(value)
    shaped = shape(scored(world, whole_distribution(world), value), config, 0.0)
    _, found = update_gradient(world, shaped, config)
    close(found, 0.7 * world.policy.visits() * (value - exact_values(world, 0.0)))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.7, 1.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma: float, lam: float) -> None:
    world, kl_coef = a_world(), 0.3
    value = torch.linspace(-1, 1, len(world.policy.number), dtype=torch.float64)
    rows = list(world.reward)
    made = scored(world, rows, value)
    shaped = shape(made, a_config({"gamma": gamma, "lam": lam}), kl_coef)
    for i, row in enumerate(rows):
        steps = len(row) - 1
        values = [float(value[world.policy.number[row[: t + 1]]]) for t in range(steps)] + [0.0]
        rewards = (-kl_coef * (made.logprob - made.ref_logprob)[i, :steps]).tolist()
        rewards[-1] += world.reward[row]
        delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(steps)]
        expected = [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, steps)) for t in range(steps)]
        assert shaped.advantage[i, :steps].tolist() == pytest.approx(expected, rel=1e-11, abs=1e-13)


# RLOO


def test_rloo_is_leave_one_out_by_hand() -> None:
    score, group = torch.tensor([1.0, 4.0, 2.0, 7.0, -3.0]).double(), torch.tensor([0, 0, 0, 1, 1])
    found = leave_one_out(score, group, torch.ones(5, dtype=torch.bool)).tolist()
    assert found == [1 - (4 + 2) / 2, 4 - (1 + 2) / 2, 2 - (1 + 4) / 2, 7 - -3, -3 - 7]


@pytest.mark.parametrize("samples", [2, 3])
def test_the_rloo_baseline_is_unbiased(samples: int) -> None:
    """Given one sample, the mean of its advantage over all the others it could have come with is r - E r."""
    world = a_world(longest=2)
    texts = [text for text in world.reward if text[0] == 0]
    with torch.no_grad():
        share = torch.stack([torch.stack(world.policy.tokens(0, text[1:])).sum().exp() for text in texts])
    reward = torch.tensor([world.reward[text] for text in texts], dtype=torch.float64)
    mean = float(share @ reward)
    groups = list(itertools.product(range(len(texts)), repeat=samples))
    members = torch.tensor(groups)
    rows = members.flatten()
    number = torch.arange(len(groups)).repeat_interleave(samples)
    advantage = leave_one_out(reward[rows], number, torch.ones(len(rows), dtype=torch.bool)).view(-1, samples)
    for own in range(len(texts)):
        first = members[:, 0] == own
        weight = share[members[first][:, 1:]].prod(1)
        assert float(weight @ advantage[first, 0]) == pytest.approx(float(reward[own]) - mean, rel=1e-10)


def test_rloos_update_descends_the_gradient_of_the_objective() -> None:
    """Every pair of responses as often as it is drawn; each pair stands for one prompt of the run."""
    world, config, kl_coef = a_world(longest=2), a_config({"estimator": "rloo"}), 0.3
    rows: list[State] = []
    for prompt in range(PROMPTS):
        texts = [row for row in whole_distribution(world) if row[0] == prompt]
        rows += [row for pair in itertools.product(texts, repeat=2) for row in pair]
    made = scored(world, rows, None)
    pairs = made.samples._replace(prompt_index=[i // 2 for i in range(len(rows))])
    made = dataclasses.replace(made, samples=pairs)
    found, untouched = update_gradient(world, shape(made, config, kl_coef), config)

    def gain(prompt: int, response: tuple[int, ...]) -> Tensor:
        logp, ref = (torch.stack(policy.tokens(prompt, response)).sum() for policy in world[:2])
        return world.reward[(prompt, *response)] - kl_coef * (logp - ref.detach())

    close(found, -gradient(world.policy.expectation(gain), world.policy))
    assert not untouched.any()


# KL, chi^2, entropy


def log_ratio(world: World, prompt: int, response: tuple[int, ...]) -> Tensor:
    logp, ref = (torch.stack(policy.tokens(prompt, response)).detach() for policy in world[:2])
    return logp - ref


def exact_kl(world: World) -> float:
    """KL(pi || pi_ref) of whole responses: by the chain rule, a state's KL as often as it is visited."""
    logp, ref = world.policy.logits.detach().log_softmax(1), world.reference.logits.detach().log_softmax(1)
    return float(world.policy.visits() @ (logp.exp() * (logp - ref)).sum(1))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("of", ["tokens", "sequence"])
def test_k1_and_k3_are_the_kl_in_expectation(estimator: Any, of: str) -> None:
    world = a_world()

    def estimate(prompt: int, response: tuple[int, ...]) -> Tensor:
        ratio = log_ratio(world, prompt, response)
        return kl_estimate(ratio if of == "tokens" else ratio.sum(), estimator).sum()

    assert float(world.policy.expectation(estimate).detach()) == pytest.approx(exact_kl(world), rel=1e-11)


def test_k2_is_the_kl_to_second_order() -> None:
    """As the policies come together the difference falls with the third power of their distance, the KL with the
    second."""
    differences, kls = [], []
    for distance in (0.02, 0.01, 0.005):
        world = a_world()
        with torch.no_grad():
            step = world.reference.logits - world.policy.logits
            world.reference.logits.copy_(world.policy.logits + distance * step)
        k2 = world.policy.expectation(lambda p, y, w=world: kl_estimate(log_ratio(w, p, y), "k2").sum())
        differences.append(abs(float(k2.detach()) - exact_kl(world)))
        kls.append(exact_kl(world))
    for i in (0, 1):
        assert differences[i] / differences[i + 1] == pytest.approx(8, rel=0.1)
        assert kls[i] / kls[i + 1] == pytest.approx(4, rel=0.1)


def test_the_experiences_kl_is_unbiased() -> None:
    world = a_world()
    shaped = shape(scored(world, whole_distribution(world), None), a_config({"estimator": "rloo"}), 0.1)
    assert float(shaped.kl.mean()) == pytest.approx(exact_kl(world), rel=1e-11)


def state_sums(world: World, estimator: str) -> Tensor:
    """What each estimator's loss descends: a divergence of the next token, summed over states as they are visited."""
    logp, ref = world.policy.logits.log_softmax(1), world.reference.logits.detach().log_softmax(1)
    divergence = {
        "k1": torch.zeros_like(logp) * logp,
        "k2": logp.exp() * (logp - ref),
        "k3": ref.exp() * (ref - logp),
        "abs": (logp.exp() - ref.exp()).abs(),
    }[estimator]
    return world.policy.visits() @ divergence.sum(1)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_what_kl_in_the_loss_descends(estimator: str) -> None:
    """k2 KL(pi || ref), k1 nothing at all, k3 KL(ref || pi), abs sum |pi - ref|: of the next token, the text given."""
    world = constant_reward(a_world(), 1.0)
    config = a_config({"estimator": "rloo"}, kl={"place": "loss", "estimator": estimator})
    shaped = shape(scored(world, whole_distribution(world), None), config, 0.3)
    found, _ = update_gradient(world, shaped, config, kl_coef=0.3)
    close(found, 0.3 * gradient(state_sums(world, estimator), world.policy))
    assert (found.abs().max() > 1e-3) == (estimator != "k1")


def test_the_entropy_bonus_ascends_the_entropy_of_the_states_visited() -> None:
    world, config = constant_reward(a_world(), 1.0), a_config({"estimator": "rloo", "entropy_coef": 0.2})
    shaped = shape(scored(world, whole_distribution(world), None), config, 0.0)
    found, _ = update_gradient(world, shaped, config)
    logp = world.policy.logits.log_softmax(1)
    close(found, 0.2 * gradient(world.policy.visits() @ (logp.exp() * logp).sum(1), world.policy))


def test_the_chi2_estimate_is_chi2_and_its_loss_descends_what_it_says() -> None:
    """E (e^l - 1) + (e^-l - 1) = chi^2(pi || ref) of whole responses. Its gradient through log pi is half of chi^2's
    and KL(ref || pi)'s, times the slope of the square root at the minibatch's mean."""
    world, config = constant_reward(a_world(), 1.0), a_config({"estimator": "rloo"}, kl={"chi2": 0.5})
    rows = whole_distribution(world)
    shaped = shape(scored(world, rows, None), config, 0.0)
    chi2 = torch.zeros((), dtype=torch.float64)
    forward = torch.zeros((), dtype=torch.float64)  # KL(ref || pi)
    for text in world.reward:
        logp, ref = (torch.stack(policy.tokens(text[0], text[1:])).sum() for policy in world[:2])
        ref = ref.detach()
        chi2 = chi2 + (logp - ref).exp().sub(1).square() * ref.exp() / PROMPTS
        forward = forward + ref.exp() * (ref - logp) / PROMPTS
    estimate = float(chi2_estimate(shaped.kl).mean())
    assert estimate == pytest.approx(float(chi2.detach()), rel=1e-11)
    found, _ = update_gradient(world, shaped, config)
    tokens = float(shaped.mask.sum()) / len(rows)  # the term is one of sequences, not divided by their lengths
    _, slope = chi2_price(estimate)
    close(found / tokens, 0.5 * slope * gradient(chi2 / 2 + forward, world.policy))


# the paper's lemma 1, and what random rewards do


def constant_reward(world: World, reward: float) -> World:
    return world._replace(reward=dict.fromkeys(world.reward, reward))


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_lemma_1_a_constant_reward_and_the_exact_critic_teach_nothing(whiten: bool, lam: float) -> None:
    """BRME (arXiv 2409.15360), lemma 1: Q = V = c everywhere, so advantages and the policy gradient are 0: for every
    response by itself, not only in the mean."""
    world, config = constant_reward(a_world(), 2.5), a_config({"lam": lam, "whiten": whiten})
    value = exact_values(world, 0.0)
    close(value, torch.full_like(value, 2.5))
    with torch.no_grad():
        world.policy.value.fill_(2.5)
    for row in world.reward:
        shaped = shape(scored(world, [row], torch.full_like(value, 2.5)), config, 0.0)
        assert not shaped.advantage.any()
        of_logits, of_values = update_gradient(world, shaped, config)
        assert not of_logits.any()
        assert not of_values.any()


@pytest.mark.parametrize("estimator", ["rloo", "group"])
def test_lemma_1_needs_no_critic_where_samples_are_compared_with_each_other(estimator: str) -> None:
    world, config = constant_reward(a_world(), 2.5), a_config({"estimator": estimator})
    shaped = shape(scored(world, list(world.reward), None), config, 0.0)
    found, _ = update_gradient(world, shaped, config)
    assert not found.any()


def test_lemma_1_with_a_critic_that_is_not_exact_holds_in_the_mean_alone() -> None:
    world, config = constant_reward(a_world(), 2.5), a_config({"lam": 1.0})
    zero = torch.zeros_like(world.policy.value)
    everything = shape(scored(world, whole_distribution(world), zero), config, 0.0)
    assert update_gradient(world, everything, config)[0].abs().max() < 1e-12
    one = shape(scored(world, [next(iter(world.reward))], zero), config, 0.0)
    assert update_gradient(world, one, config)[0].abs().max() > 0.1


def mean_square_of_gradients(std: float, config: PPOConfig, draws: int = 12) -> float:
    """E |gradient|^2 of one update on 16 responses whose rewards are noise of this std around 1."""
    world, total = a_world(longest=2), 0.0
    texts = whole_distribution(world)
    generator = torch.Generator().manual_seed(0)
    value = torch.ones_like(world.policy.value)
    for _ in range(draws):
        rows = [texts[i] for i in torch.randperm(len(texts), generator=generator)[:16].tolist()]
        noise = 1 + std * torch.randn(16, generator=generator, dtype=torch.float64)
        made = dataclasses.replace(scored(world, rows, value), reward=noise)
        found, _ = update_gradient(world, shape(made, config, 0.0), config)
        total += float(found.square().sum()) / draws
    return total


def test_a_rewards_noise_reaches_the_gradient_by_its_variance_unless_whitened() -> None:
    """The stochastic case of section 6.2: the least of five N(0, 1) heads has std 0.669, so its gradients are smaller
    than one random head's by its square, and a constant reward's are 0. Whitened advantages have unit variance whatever
    the reward's was: with whitening, what is left of the ordering is not the size of the steps."""
    plain, white = a_config(), a_config({"whiten": True})
    one, least, none = (mean_square_of_gradients(std, plain) for std in (1.0, 0.669, 0.0))
    assert least / one == pytest.approx(0.669**2, rel=1e-9)
    assert none == 0.0
    assert mean_square_of_gradients(0.669, white) == pytest.approx(mean_square_of_gradients(1.0, white), rel=1e-6)
    assert math.isclose(mean_square_of_gradients(1e-3, white), mean_square_of_gradients(1.0, white), rel_tol=0.05)
