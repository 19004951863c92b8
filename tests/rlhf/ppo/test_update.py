"""The update: one gradient whatever the micro-batch, nothing that is not finite, the same bits for the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.rlhf.ppo import update as module
from prudent.rlhf.ppo.batch import Experience, TokenBatch, token_batch
from prudent.rlhf.ppo.update import open_optimizer, set_learning_rates, update

from .update_cases import Recurrent, a_config, gradients, run, sampled

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gae": ({}, {}),
    "gae, adapter critic": ({}, {"policy": {"critic": "adapter"}}),
    "entropy": ({"entropy_coef": 0.1}, {}),
    "KL in the loss": ({}, {"kl": {"place": "loss", "coef": 0.3}}),
    "chi2": ({}, {"kl": {"chi2": 0.7}}),
    "group, all at once": (
        {"estimator": "group", "entropy_coef": 0.1},
        {"kl": {"place": "loss", "estimator": "k3", "chi2": 0.5}},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_of_any_size_add_up_to_one_big_batch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    update_options, others = SETTINGS[name]
    config = a_config(update_options, **others)
    experience = sampled(config)
    whole = gradients(monkeypatch, config, experience)
    for micro_tokens in (1, 7, 20, 45):
        small = config.model_copy(update={"update": config.update.model_copy(update={"micro_tokens": micro_tokens})})
        parts = gradients(monkeypatch, small, experience)
        assert parts.keys() == whole.keys()
        for key, gradient in whole.items():
            torch.testing.assert_close(parts[key], gradient, rtol=1e-11, atol=1e-13)


def test_the_first_gradient_is_the_policy_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """At ratio 1: - mean over tokens of A grad log pi, written here without a clip, a ratio or a micro-batch."""
    config = a_config({"estimator": "rloo", "micro_tokens": 20})
    experience = sampled(config, moved=0.0)
    found = gradients(monkeypatch, config, experience)
    policy = Recurrent()
    total = torch.zeros((), dtype=torch.float64)
    for row, (prompt, response) in enumerate(
        zip(experience.samples.prompts, experience.samples.responses, strict=True)
    ):
        states = policy.gru(policy.embedding(torch.tensor([prompt + response[:-1]])))[0][0, len(prompt) - 1 :]
        logprob = (states @ policy.head.weight.T).log_softmax(1)[range(len(response)), response]
        total = total - (logprob * experience.advantage[row, : len(response)]).sum()
    (total / experience.mask.sum()).backward()
    for name, parameter in policy.named_parameters():
        assert (name in found) == (parameter.grad is not None)
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-13)


def test_epochs_and_minibatches_take_every_kept_row_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_config({"epochs": 3, "minibatches": 4})
    experience = sampled(config)
    experience.dropped[3] = True
    seen: list[list[int]] = []
    gradient = module.MinibatchGradient.__call__

    def note(self: Any, rows: list[int], bar: Any) -> Any:
        seen.append(rows)
        return gradient(self, rows, bar)

    monkeypatch.setattr(module.MinibatchGradient, "__call__", note)
    _, metrics = run(config, experience)
    epochs = [seen[start : start + 4] for start in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
        assert {len(rows) for rows in epoch} == {2, 3}
    assert epochs[0] != epochs[1]
    assert (metrics["update/epochs"], metrics["update/steps"], metrics["update/skipped"]) == (3, 12, 0)


def test_more_minibatches_than_rows_are_as_many_as_rows() -> None:
    _, metrics = run(a_config({"minibatches": 64}))
    assert (metrics["update/epochs"], metrics["update/steps"]) == (1, 10)


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_one_graph_at_a_time_and_one_forward_for_actor_and_shared_critic(critic: str) -> None:
    policy, config = Recurrent(), a_config({"micro_tokens": 20}, policy={"critic": critic})
    experience = sampled(config)
    alive: list[int] = []
    forward = policy.hidden

    def watched(batch: TokenBatch, role: str) -> Tensor:
        hidden = forward(batch, role)
        alive.append(1)
        assert len(alive) == 1  # the last graph was gone through before this one was made
        hidden.register_hook(lambda gradient: alive.clear())
        return hidden

    policy.hidden = watched  # type: ignore[method-assign]
    run(config, experience, policy)
    tokens = sum(len(p) + len(r) - 1 for p, r in zip(*experience.samples[:2], strict=True))
    assert sum(policy.graphs) == tokens * (1 if critic == "shared" else 2)
    assert max(policy.graphs) <= 20


@pytest.mark.parametrize("estimator", ["rloo", "group"])
def test_without_a_critic_no_value_is_asked_for(estimator: str) -> None:
    policy = Recurrent()
    policy.values = lambda hidden_rows: pytest.fail("no critic")  # type: ignore[method-assign, assignment]
    before = policy.value_head.weight.clone()
    config = a_config({"estimator": estimator})
    experience = sampled(config, policy=Recurrent())
    assert experience.value is None
    _, metrics = run(config, experience, policy)
    assert torch.equal(policy.value_head.weight, before)
    assert "value/loss" not in metrics
    assert metrics["update/steps"] == 1


def test_a_critic_that_the_estimator_does_not_ask_is_left_alone() -> None:
    config = a_config({"estimator": "rloo"}, policy={"critic": "shared"})
    policy, metrics = run(config, sampled(config))
    assert torch.equal(policy.value_head.weight, Recurrent().value_head.weight)
    assert "value/loss" not in metrics


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_the_critics_gradient_is_times_value_coef(monkeypatch: pytest.MonkeyPatch, critic: str) -> None:
    once, thrice = (a_config({"value_coef": coef}, policy={"critic": critic}) for coef in (0.5, 1.5))
    experience = sampled(once)
    first, other = (gradients(monkeypatch, config, experience) for config in (once, thrice))
    for name in ["value_head.weight", *(["critic_gru.weight_hh_l0"] if critic == "adapter" else [])]:
        torch.testing.assert_close(other[name], 3 * first[name], rtol=1e-11, atol=1e-14)
    same = "head.weight" if critic == "shared" else "gru.weight_hh_l0"  # the actor's alone
    assert torch.equal(other[same], first[same])


def test_equal_seeds_give_equal_bits_and_other_seeds_other_minibatches() -> None:
    config = a_config({"epochs": 2, "minibatches": 3, "micro_tokens": 30})
    first, again, other = (run(config, seed=seed) for seed in (1, 1, 2))
    assert first[1] == again[1]
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first[0].parameters(), other[0].parameters(), strict=True))


def test_dropout_draws_from_the_updates_generator_and_torchs_own_is_left_alone() -> None:
    config = a_config({"micro_tokens": 30})
    experience, results = sampled(config), []
    for seed in (1, 1, 2):
        policy = Recurrent()
        policy.dropout.p = 0.5
        optimizer = open_optimizer(policy, config)
        torch.manual_seed(len(results))  # what torch's generator stands at is of no consequence
        state = torch.random.get_rng_state()
        update(policy, optimizer, experience, config, kl_coef=0.0, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.random.get_rng_state(), state)
        results.append(policy.head.weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("mode", [True, False])
def test_the_policys_mode_is_restored_and_no_gradient_is_left(mode: bool) -> None:
    policy = Recurrent().train(mode)
    run(a_config(), policy=policy)
    assert policy.training is mode
    assert all(parameter.grad is None for parameter in policy.parameters())


def _poison(name: str) -> Callable[[Experience], None]:
    def spoil(experience: Experience) -> None:
        table = getattr(experience, name)
        table[4, 0] = math.nan

    return spoil


@pytest.mark.parametrize("name", ["advantage", "logprob", "returns", "value"])
def test_a_loss_that_is_not_finite_skips_its_step_alone(name: str) -> None:
    config = a_config({"minibatches": 5})
    experience = sampled(config)
    _poison(name)(experience)
    policy, metrics = run(config, experience)
    assert (metrics["update/steps"], metrics["update/skipped"], metrics["update/epochs"]) == (4, 1, 1)
    assert all(torch.isfinite(parameter).all() for parameter in policy.parameters())
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    policy, config = Recurrent(), a_config()
    experience = sampled(config)
    policy.head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = [parameter.clone() for parameter in policy.parameters()]
    _, metrics = run(config, experience, policy)
    assert (metrics["update/steps"], metrics["update/skipped"]) == (0, 1)
    assert math.isnan(metrics["policy/grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_without_a_sample_left_every_step_counts_as_skipped() -> None:
    config = a_config({"epochs": 2, "minibatches": 3})
    experience = sampled(config)
    experience.dropped.fill_(True)
    policy, metrics = run(config, experience)
    assert (metrics["update/steps"], metrics["update/skipped"], metrics["update/epochs"]) == (0, 6, 0)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), Recurrent().parameters(), strict=True))


def test_the_update_ends_once_the_policy_is_further_than_max_kl() -> None:
    config = a_config({"epochs": 50, "minibatches": 2, "lr": 0.03, "max_kl": 0.02})
    experience = sampled(config, moved=0.0)
    _, metrics = run(config, experience)
    assert metrics["policy/update_kl"] > 0.02
    assert 1 <= metrics["update/steps"] < 100
    assert metrics["update/epochs"] == metrics["update/steps"] / 2


def test_gradients_are_clipped_together_and_logged_before() -> None:
    experience = sampled(a_config())
    loose, tight = (run(a_config({"max_grad_norm": norm}), experience)[1] for norm in (1e3, 1e-3))
    assert loose["policy/grad_norm"] == tight["policy/grad_norm"] > 1e-3


def test_the_clip_takes_part_once_the_policy_has_moved() -> None:
    config = a_config({"estimator": "rloo", "epochs": 6, "lr": 0.01, "clip": 0.05})
    experience = sampled(config, moved=0.0)
    _, metrics = run(config, experience)
    assert 0 < metrics["policy/clip_fraction"] < 1
    at_first = -float(experience.advantage[experience.mask].mean())  # the surrogate at ratio 1
    assert metrics["policy/loss"] < at_first


def test_an_update_raises_the_probability_of_what_was_better_than_the_rest() -> None:
    config = a_config({"estimator": "rloo", "epochs": 4, "lr": 0.02})
    policy = Recurrent()
    experience = sampled(config, policy=policy, moved=0.0)
    run(config, experience, policy)
    samples = experience.samples
    batch = token_batch(samples, range(len(samples.responses)), packed=False, device="cpu")
    with torch.no_grad():
        now = policy.logprobs(policy.hidden(batch, "actor"), batch, 1.0).logprob
    change = now - experience.logprob[batch.sequence, batch.offset]
    assert float((change * experience.advantage[batch.sequence, batch.offset]).sum()) > 0


def test_rates_warm_up_with_the_loops_step_each_group_from_its_own() -> None:
    config = a_config({"warmup": 4, "lr": 0.1})
    optimizer = open_optimizer(Recurrent(), config)
    rates = []
    for step in (0, 1, 3, 100):
        set_learning_rates(optimizer, config, step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [pytest.approx(pair) for pair in ([0.025, 0.25], [0.05, 0.5], [0.1, 1.0], [0.1, 1.0])]


def test_weight_decay_and_rates_reach_the_optimizer() -> None:
    optimizer = open_optimizer(Recurrent(), a_config({"weight_decay": 0.3, "lr": 0.1}))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("policy", 0.1, 0.3),
        ("value", 1.0, 0.3),
    ]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_that_is_not_installed_is_refused_by_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=rf"update.optimizer {name} needs bitsandbytes: pip install 'prudent\[bits"):
        open_optimizer(Recurrent(), a_config({"optimizer": name}))


def test_the_progress_bar_counts_the_tokens_of_every_epoch(capfd: pytest.CaptureFixture[str]) -> None:
    config = a_config({"epochs": 2})
    experience, policy = sampled(config), Recurrent()
    for progress in (False, True):
        update(
            policy,
            open_optimizer(policy, config),
            experience,
            config,
            kl_coef=0.0,
            generator=torch.Generator(),
            progress=progress,
        )
        assert ("update" in capfd.readouterr().err) == progress
