"""The dtypes that a policy's weights are kept in and computed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import PPOConfig


def is_mixed(config: PPOConfig, weights: torch.dtype, device: torch.device) -> bool:
    """Whether fp32 `weights` compute in bf16, under autocast: a step of 1e-6 is lost in a bf16 weight.

    So it is where a GPU trains them all and `config.dtype` leaves it open; meta stands for the GPU of a plan.
    """
    trained = config.policy.mode == "full" and weights == torch.float32
    return trained and config.dtype == "auto" and device.type in ("cuda", "meta")


def cast(model: Any, dtype: torch.dtype) -> Any:
    """`model`, a causal language model, with its parameters in `dtype`, as `from_pretrained` would have loaded it.

    nn.Module.to takes buffers along, and in bf16 the rotary frequencies put position 1000 off by up to 1.8 rad. What
    `from_pretrained` kept in a wider dtype than the model's stays.
    """
    before = model.dtype
    for parameter in model.parameters():
        if parameter.dtype == before:
            parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def in_dtype(model: Any, dtype: torch.dtype) -> Iterator[Any]:
    """`model` with copies of its parameters in `dtype` in their places, as of `cast`, for a block without gradient.

    What autocast does not give: flash-attn takes half precisions alone, a cache keys and values of one dtype,
    transformers' batching runs in a thread of its own, and a token reads each weight once instead of casting it anew.
    """
    before, copies = model.dtype, {}
    wide: list[tuple[nn.Module, str, nn.Parameter]] = []
    if before != dtype:
        places = ((m, name, p) for m in model.modules() for name, p in m._parameters.items())
        wide = [(module, name, p) for module, name, p in places if p is not None and p.dtype == before]
    for module, name, parameter in wide:
        if parameter not in copies:  # tied weights stay tied
            copies[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        module._parameters[name] = copies[parameter]
    try:
        yield model
    finally:
        for module, name, parameter in wide:
            module._parameters[name] = parameter


def trunk_dtype(config: PPOConfig, device: torch.device) -> torch.dtype:
    """The dtype that the model is loaded in. auto: bfloat16 on a GPU, but for weights that are trained themselves."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if device.type == "cuda" and config.policy.mode == "lora" else torch.float32
