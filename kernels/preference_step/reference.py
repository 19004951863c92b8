"""`preference_step` in plain torch with its gradient written out: the oracle of the other executions.

It follows the formulas in README.md line by line and is not meant to be fast: it computes every column of every head,
and one matrix holds the coefficients of all of them. Arithmetic is in fp32, or fp64 when `features` is fp64; matrix
products sum in fp64 always (../exact.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ensemble_reward.reference import philox_normal
from ..exact import times, transposed_times
from .contract import Inputs, Outputs


def step(inputs: Inputs) -> Outputs:
    """(loss [], dweight [2K, D], dbias [2K], accuracy [], std [])."""
    dtype, heads, pairs = inputs.output_dtype, inputs.num_heads, inputs.num_pairs
    x = inputs.features if inputs.rows is None else inputs.features.index_select(0, inputs.rows)
    x = x.to(dtype)
    z = times(x, inputs.weight.to(dtype).T) + inputs.bias.to(dtype)
    reward = z[:, :heads].mean(dim=1)
    coefficient = torch.zeros_like(z)  # d loss / d z
    if inputs.loss == "bt":
        loss, d_reward = _bradley_terry(reward, inputs)
        judged, std = reward, torch.zeros_like(loss)
    else:
        loss, d_own, judged, std = _brme(z, inputs)
        coefficient += d_own
        d_reward = torch.zeros_like(reward)
    total, both = reward.sum(), reward[:pairs] + reward[pairs:]
    if inputs.bsr:
        loss = loss + inputs.bsr / (4 * pairs) * total.square()
        d_reward = d_reward + inputs.bsr / (2 * pairs) * total
    if inputs.centre:
        loss = loss + inputs.centre * both.square().mean()
        d_reward = d_reward + 2 * inputs.centre / pairs * both.repeat(2)
    coefficient[:, :heads] += d_reward[:, None] / heads
    accuracy = (judged[:pairs] > judged[pairs:]).to(dtype).mean()
    dweight, dbias = transposed_times(coefficient, x), coefficient.sum(dim=0)
    return loss, dweight.to(inputs.weight.dtype), dbias.to(inputs.bias.dtype), accuracy, std


def _bradley_terry(reward: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Eq. 3 of BRME and its gradient at the rewards [2P]."""
    pairs = inputs.num_pairs
    difference = reward[:pairs] - reward[pairs:]
    if inputs.margin is not None:
        difference = difference - inputs.margin.to(reward.dtype)
    # torch's softplus is the identity above 20, so its slope is 1 there
    slope = torch.where(-difference > 20, torch.ones_like(difference), torch.sigmoid(-difference)) / pairs
    return F.softplus(-difference).mean(), torch.cat([-slope, slope])


def _brme(z: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 8 of BRME on each pair's own head: loss, its gradient at z [2P, 2K], the own means [2P], their mean std."""
    heads, pairs, dtype = inputs.num_heads, inputs.num_pairs, z.dtype
    assert inputs.p_hat is not None
    assert inputs.head_id is not None
    half = inputs.alpha * (inputs.p_hat.to(dtype) - 0.5)
    own = inputs.head_id.repeat(2)[:, None]
    mean, raw = z.gather(1, own)[:, 0], z.gather(1, own + heads)[:, 0]
    std = F.softplus(raw) + inputs.std_floor
    residual = mean - torch.cat([half, -half])
    if inputs.seed is None:
        loss, d_mean, d_std = residual.square() + std.square(), 2 * residual, 2 * std
    else:
        noise = philox_normal(inputs.seed, 2 * pairs, heads, dtype).gather(1, own)[:, 0]
        sampled = residual + std * noise
        loss, d_mean, d_std = sampled.square(), 2 * sampled, 2 * sampled * noise
    gradient = torch.zeros_like(z).scatter(1, own, d_mean[:, None])
    gradient.scatter_(1, own + heads, (d_std * torch.sigmoid(raw))[:, None])
    return loss.sum() / pairs, gradient / pairs, mean, std.mean()
