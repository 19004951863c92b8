"""BRME's toy (arXiv 2409.15360, section 4): preference pairs, reward models, and PPO on 8 x 8 cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ppo.losses import policy_loss
from ..reward.losses import bradley_terry
from .config import ToyPolicyConfig, ToyRewardConfig
from .networks import Layers, forward, networks, trained

SIZE = 8  # prompts, and responses to each


class Judged(NamedTuple):
    """The reward of a step's samples, [N, 8, n], and its exact mean under the policy, value [N, 8, 1]."""

    reward: Tensor
    value: Tensor


# (probability [N, 8, 8], drawn [N, 8, n] int64) -> Judged
RewardFunction = Callable[[Tensor, Tensor], Judged]


def preference_pairs(seeds: int, generator: torch.Generator) -> Tensor:
    """[S, 16, 3] int64 (prompt, chosen, rejected): every prompt's own response against two random others."""
    others = torch.rand(seeds, SIZE, SIZE, generator=generator)
    others.diagonal(dim1=1, dim2=2).fill_(-1.0)
    rejected = others.topk(2, dim=2).indices.reshape(seeds, 2 * SIZE)
    prompt = torch.arange(SIZE).repeat_interleave(2).expand_as(rejected)
    return torch.stack([prompt, prompt, rejected], dim=2)


def reward_models(
    pairs: Tensor, models: int, config: ToyRewardConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Train `models` networks per seed with different initial weights on the same pairs [S, P, 3].

    Returns:
        Rewards [S, models, 8, 8], and each model's share of pairs ranked right [S, models].
    """
    seeds = pairs.shape[0]
    count = seeds * models
    layers = networks(count, [2 * SIZE, *[config.width] * config.layers, 1], generator, config.scale)
    cells = _cells()
    prompt, chosen, rejected = (t.repeat_interleave(models, dim=0) for t in pairs.unbind(dim=2))
    sides = cells[torch.cat([prompt * SIZE + chosen, prompt * SIZE + rejected], dim=1)]  # [count, 2P, 16]
    adam = torch.optim.Adam(trained(layers), lr=config.lr)
    for _ in range(config.steps):
        reward = forward(layers, sides, config.activation)[..., 0]
        adam.zero_grad()
        # the mean over all pairs of all networks, times their number: each gets the gradient of its own mean
        loss = bradley_terry(*(side.flatten() for side in reward.chunk(2, dim=1)))
        (loss * count).backward()  # type: ignore[no-untyped-call]
        adam.step()
    with torch.no_grad():
        better, worse = forward(layers, sides, config.activation)[..., 0].chunk(2, dim=1)
        rewards = forward(layers, cells.expand(count, -1, -1), config.activation).view(seeds, models, SIZE, SIZE)
    ranked_right = (better > worse).double().mean(dim=1).view(seeds, models)
    return normalised(rewards, config.normalise), ranked_right


def _cells() -> Tensor:
    """[64, 16]: one-hot prompt and one-hot response of every cell, prompt after prompt."""
    one_hot = torch.eye(SIZE)
    return torch.cat([one_hot.repeat_interleave(SIZE, dim=0), one_hot.repeat(SIZE, 1)], dim=1)


def normalised(rewards: Tensor, how: Literal["none", "model", "prompt"]) -> Tensor:
    """[..., 8, 8] rewards: unchanged, each model standardised over its cells, or each prompt centred.

    Bradley-Terry leaves a constant per prompt undetermined; it differs between models and changes their minimum.
    """
    if how == "prompt":
        return rewards - rewards.mean(dim=-1, keepdim=True)
    if how == "model":
        centred = rewards - rewards.mean(dim=(-2, -1), keepdim=True)
        return centred / rewards.std(dim=(-2, -1), keepdim=True)
    return rewards


def fresh_policies(count: int, config: ToyPolicyConfig, generator: torch.Generator) -> Layers:
    """`count` untrained policies."""
    return networks(count, [SIZE, config.width, config.width, SIZE], generator)


def log_policy(layers: Layers) -> Tensor:
    """[N, 8, 8] log-probabilities: policy, prompt, response."""
    prompts = torch.eye(SIZE).expand(layers[0][0].shape[0], SIZE, SIZE)
    return F.log_softmax(forward(layers, prompts), dim=2)


def train_policies(
    layers: Layers,
    reward: RewardFunction,
    config: ToyPolicyConfig,
    generator: torch.Generator,
    *,
    seeds: int,
    each_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Train N = arms * seeds policies in place by PPO; the arms of one seed see the same random numbers.

    Policies are ordered arm by arm. The advantage is the reward minus its exact mean under the policy.

    Args:
        layers: the initial policies, which are also the reference of `config.kl`.
        reward: see `RewardFunction`.
        each_step: called with the probabilities [N, 8, 8] before every step and at the end.

    Returns:
        [N, 8, 8] the final probabilities.
    """
    count = layers[0][0].shape[0]
    with torch.no_grad():
        reference = log_policy(layers)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(trained(layers), lr=config.lr)
    for _ in range(config.steps):
        with torch.no_grad():
            old = log_policy(layers)
            probability = old.exp()
            if each_step is not None:
                each_step(probability)
            uniform = torch.rand(seeds, SIZE, config.samples, generator=generator).repeat(count // seeds, 1, 1)
            drawn = draw(probability, uniform)
            judged = reward(probability, drawn)
            price = config.kl * (old - reference)
            value = judged.value - (probability * price).sum(dim=2, keepdim=True)
            advantage = judged.reward - price.gather(2, drawn) - value
            if config.whiten:
                spread = advantage.std(dim=(1, 2), keepdim=True)
                advantage = (advantage - advantage.mean(dim=(1, 2), keepdim=True)) / (spread + 1e-8)
            old_logprob = old.gather(2, drawn)
        for _ in range(config.epochs):
            loss, _ = policy_loss(log_policy(layers).gather(2, drawn), old_logprob, advantage, config.clip)
            optimizer.zero_grad()
            loss.mean(dim=(1, 2)).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        probability = log_policy(layers).exp()
        if each_step is not None:
            each_step(probability)
    return probability


def draw(probability: Tensor, uniform: Tensor) -> Tensor:
    """Responses by inversion: probability [N, 8, 8], uniform [N, 8, n] in [0, 1) -> [N, 8, n] int64."""
    edges = probability.cumsum(dim=2)[..., :-1].contiguous()
    return torch.searchsorted(edges, uniform, right=True)


def right(table: Tensor) -> Tensor:
    """[..., 8, 8] -> [...] int64: number of prompts whose right response has the largest value."""
    return (table.argmax(dim=-1) == torch.arange(SIZE)).sum(dim=-1)
