"""Compute many small independent MLPs as one batch, so that all seeds of all arms train together."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]  # weight [N, in, out] and bias [N, 1, out] of each layer


def networks(count: int, widths: list[int], generator: torch.Generator, scale: float = 1.0) -> Layers:
    """`count` MLPs whose layers are initialised as torch.nn.Linear, uniform in +-in^-1/2, times `scale`."""
    layers = []
    for fan_in, fan_out in pairwise(widths):
        bound = scale * fan_in**-0.5
        weight = (torch.rand(count, fan_in, fan_out, generator=generator) * 2 - 1) * bound
        bias = (torch.rand(count, 1, fan_out, generator=generator) * 2 - 1) * bound
        layers.append((weight, bias))
    return layers


def repeated(layers: Layers, times: int) -> Layers:
    """`times` copies of N networks one after another: [times * N, ...]."""
    return [(weight.repeat(times, 1, 1), bias.repeat(times, 1, 1)) for weight, bias in layers]


def trained(layers: Layers) -> list[Tensor]:
    """The tensors to optimise, with gradients enabled."""
    return [tensor.requires_grad_() for layer in layers for tensor in layer]


def forward(layers: Layers, x: Tensor, activation: Literal["tanh", "relu"] = "tanh") -> Tensor:
    """x [N, rows, in] -> [N, rows, out], with the activation between the layers."""
    act = torch.tanh if activation == "tanh" else torch.relu
    for i, (weight, bias) in enumerate(layers):
        x = torch.baddbmm(bias, act(x) if i else x, weight)
    return x
