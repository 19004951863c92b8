"""The update on a transformer, through `Policy` and `score`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.rlhf.ppo.advantages import shape
from prudent.rlhf.ppo.batch import Experience, Samples
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.policy.policy import Policy
from prudent.rlhf.ppo.rewards.sources import Rewards
from prudent.rlhf.ppo.score import score
from prudent.rlhf.ppo.update import open_optimizer, update

from .cases import tiny_lm
from .update_cases import a_config


class Lengths:
    """A reward source: the response's length, over ten."""

    name, num_heads = "lengths", None

    def __call__(self, samples: Samples, seed: int | None = None) -> Rewards:
        return Rewards(torch.tensor([len(response) / 10 for response in samples.responses]), None, None, None, None)


def on_a_llama(config: PPOConfig) -> tuple[Policy, Experience]:
    policy = Policy(config, tiny_lm(vocab_size=40), device="cpu")
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():  # off its start, where values are 0 and half of a LoRA has no gradient
        for parameter in policy.trainable_state().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    rows = [index for index in range(4) for _ in range(2)]
    responses = [torch.randint(40, (1 + (5 * i) % 7,), generator=draw).tolist() for i in range(8)]
    samples = Samples([[30 + i] * (1 + i) for i in rows], responses, [i % 3 > 0 for i in range(8)], rows)
    experience = score(policy, Lengths(), samples, config)
    return policy, shape(experience, config, config.kl.coef)


def llama_gradients(monkeypatch: pytest.MonkeyPatch, config: PPOConfig) -> tuple[dict[str, Tensor], dict[str, float]]:
    policy, experience = on_a_llama(config)
    seen: dict[str, Tensor] = {}

    def look(*_: Any, **__: Any) -> Tensor:
        seen.update({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
        return torch.ones(())

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", look)
        optimizer, generator = open_optimizer(policy, config), torch.Generator()
        metrics = update(policy, optimizer, experience, config, kl_coef=config.kl.coef, generator=generator)
    return seen, metrics


LLAMAS: dict[str, dict[str, Any]] = {
    "shared critic": {},
    "adapter critic": {"policy": {"critic": "adapter"}},
    "full": {"policy": {"mode": "full"}},
    "checkpointing": {"policy": {"critic": "adapter", "gradient_checkpointing": True}},
    "packed": {"packed": True},
}


@pytest.mark.parametrize("name", LLAMAS)
def test_a_transformers_gradient_is_the_same_whatever_the_micro_batch(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = {"kl": {"chi2": 0.3, "place": "loss"}, **LLAMAS[name]}
    whole, metrics = llama_gradients(monkeypatch, a_config({"entropy_coef": 0.1}, **options))
    parts, _ = llama_gradients(monkeypatch, a_config({"entropy_coef": 0.1, "micro_tokens": 12}, **options))
    assert parts.keys() == whole.keys()
    assert len(whole) > 2
    for key, gradient in whole.items():
        torch.testing.assert_close(parts[key], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    assert metrics["policy/clip_fraction"] == 0  # what was scored is what is updated: every ratio is 1
    assert abs(metrics["policy/update_kl"]) < 1e-6


def test_checkpointing_changes_memory_and_not_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = llama_gradients(monkeypatch, a_config(policy={"critic": "adapter"}))
    saving, _ = llama_gradients(monkeypatch, a_config(policy={"critic": "adapter", "gradient_checkpointing": True}))
    assert plain.keys() == saving.keys()
    assert all(torch.equal(plain[key], saving[key]) for key in plain)


@pytest.mark.parametrize("critic", ["none", "shared", "adapter"])
def test_only_what_is_trained_moves(critic: str) -> None:
    config = a_config({"estimator": "rloo" if critic == "none" else "gae"}, policy={"critic": critic})
    policy, experience = on_a_llama(config)
    trained = set(policy.trainable_state())
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    start = {name: value.clone() for name, value in policy.trainable_state().items()}
    update(policy, open_optimizer(policy, config), experience, config, kl_coef=0.0, generator=torch.Generator())
    moved = [name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) == len(trained)
    assert all(not torch.equal(value, start[name]) for name, value in policy.trainable_state().items())
    assert not policy.training
