"""Tiny language models and policies on them, for the tests of policy, scoring and update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prudent.rlhf.ppo.batch import Samples, TokenBatch, token_batch
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.policy.policy import Policy, RewardOnTrunk

VOCABULARY, WIDTH = 97, 32
SAMPLES = Samples(
    [[1, 2, 3], [1, 2, 3], [5], [6, 7]],
    [[4, 8, 9], [10, 11, 12, 13, 14, 15], [9], [20, 21, 22, 23]],
    [True, False, True, False],
    [0, 0, 1, 2],
)


def tiny_lm(**changes: Any) -> Any:
    """A random Llama, far from uniform."""
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of another family."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **common, max_position_embeddings=64, pad_token_id=0, **changes)
    return AutoModelForCausalLM.from_config(config).eval()


GATED = {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 3},
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 8},
    "gemma2": {**GATED, "head_dim": 8, "sliding_window": 3, "final_logit_softcapping": 3.0},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "gpt_neox": {"intermediate_size": 48},
    "cohere": {**GATED, "logit_scale": 0.25},
    "granite": {**GATED, "logits_scaling": 4.0},
}


def settings(**changes: Any) -> PPOConfig:
    base: dict[str, Any] = {"model": "tiny", "prompts": "p", "output": "o", "reward": {"source": "r"}}
    update = {"micro_tokens": 8192, **changes.pop("update", {})}
    return PPOConfig(**{**base, "update": update, **changes})


def stirred(policy: Policy) -> Policy:
    """Every trained parameter off its start, as after some steps."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_state().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def make(lm: Any = None, reward: RewardOnTrunk | None = None, **changes: Any) -> Policy:
    torch.manual_seed(1)
    return Policy(settings(**changes), tiny_lm() if lm is None else lm, device="cpu", reward=reward)


def whole(packed: bool = False) -> TokenBatch:
    return token_batch(SAMPLES, range(4), packed=packed, device="cpu")


def plain_logprobs(lm: Any, temperature: float = 1.0) -> Tensor:
    """[R] by the model's own logits, one sequence at a time."""
    parts = []
    for prompt, response in zip(SAMPLES.prompts, SAMPLES.responses, strict=True):
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        targets = torch.tensor(response)[:, None]
        parts.append((logits.float() / temperature).log_softmax(-1).gather(1, targets)[:, 0])
    return torch.cat(parts)


def loss_of(policy: Policy, batch: TokenBatch) -> Tensor:
    """Takes in log-probability, entropy and value, so that every trained part has a gradient."""
    hidden = policy.hidden(batch, "actor")
    out = policy.logprobs(hidden, batch, 0.8)
    critic = policy.hidden(batch, "critic") if policy.config.critic == "adapter" else hidden
    value = policy.values(critic[batch.rows])
    weight = torch.linspace(-1, 1, len(batch.rows))
    return (weight * out.logprob + 0.3 * out.entropy).sum() + (value - weight).square().sum()


def gradients(policy: Policy, batch: TokenBatch) -> dict[str, Tensor]:
    policy.train()
    policy.zero_grad()
    loss_of(policy, batch).backward()
    return {
        f"{g['name']}{i}": p.grad.clone()
        for g in policy.parameter_groups(policy.config)
        for i, p in enumerate(g["params"])
    }


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out
