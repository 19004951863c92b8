"""Describe a policy: its parts, and their cost in parameters and bytes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .policy import Policy


def describe_policy(policy: Policy) -> str:
    """A few lines: model, LoRAs, critic and reward in use, and their cost in parameters and bytes."""
    config = policy.config
    lora = config.policy.mode == "lora"
    trained = list(_unique(p for p in policy.parameters() if p.requires_grad))
    frozen = list(_unique(p for p in policy.parameters() if not p.requires_grad))
    count, size = sum(p.numel() for p in trained), _size(trained)
    # two moments: AdamW's of the parameter's dtype, bitsandbytes' of a byte each
    moments = 2 * (size if config.update.optimizer == "adamw" else count)
    model = policy.model
    lines = [
        f"policy: {type(model).__name__}, {model.config.num_hidden_layers} layers of width {policy.hidden_size}, "
        f"{_name(model.dtype)}, {policy.attention}, {'packed' if policy.packed else 'padded'}, on {policy.device}",
        f"actor: {f'LoRA of rank {config.policy.lora_rank}' if lora else 'all weights'}",
        f"reference: {'the same trunk, LoRAs off' if lora else 'a frozen copy of the model'}",
        f"critic: {_critic(config.critic)}"
        + (", starting at the reward's heads" if config.policy.critic_init == "reward" else ""),
        f"reward: {_reward(policy)}",
        f"trained: {_count(count)} parameters: weights {_bytes(size)}, gradients {_bytes(size)}, "
        f"{config.update.optimizer} {_bytes(moments)}"
        + (", activations computed again in the backward pass" if config.policy.gradient_checkpointing else ""),
        f"frozen: {_count(sum(p.numel() for p in frozen))} parameters: weights {_bytes(_size(frozen))}",
    ]
    return "\n".join(lines)


def _critic(kind: str) -> str:
    return {
        "none": "none",
        "shared": "a value head on the actor's hidden states (no pass of its own)",
        "adapter": "a LoRA of its own and a value head (one more pass)",
    }[kind]


def _reward(policy: Policy) -> str:
    if policy.reward_head is None:
        return "not on this trunk"
    count = policy.reward_head.num_heads
    heads = f"{count} heads" if count > 1 else "one head"
    if policy.reward_taps is not None:
        heads += f" reading {', '.join(map(str, policy.reward_taps))},"
    if policy.reward_kind == "shared":
        return f"{heads} on the reference's hidden states (no pass of their own)"
    return f"a frozen LoRA on the trunk and {heads} (one more pass)"


def _unique(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(p): p for p in parameters}.values()


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
