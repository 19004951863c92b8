"""The dtypes in which a policy's weights are stored and computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import PPOConfig


def is_mixed(config: PPOConfig, weights: torch.dtype, device: torch.device) -> bool:
    """Whether fp32 `weights` compute in bf16 under autocast, because a bf16 weight would lose updates of 1e-6.

    True if a GPU trains all weights and `config.dtype` is auto; device meta stands for the GPU of a plan.
    """
    trained = config.policy.mode == "full" and weights == torch.float32
    return trained and config.dtype == "auto" and device.type in ("cuda", "meta")


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast a causal language model's parameters to `dtype` in place, as `from_pretrained` would load them.

    nn.Module.to would cast buffers too: rotary frequencies in bf16 are off by up to 1.8 rad at position 1000.
    Parameters that `from_pretrained` kept in a wider dtype than the model's stay.
    """
    before = model.dtype
    for parameter in model.parameters():
        if parameter.dtype == before:
            parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def in_dtype(model: Any, dtype: torch.dtype) -> Iterator[Any]:
    """Replace `model`'s parameters by copies in `dtype`, as `cast` would make them, for a block without gradient.

    Sampling needs more than autocast: flash-attn takes half precision only, a cache needs keys and values of one dtype,
    transformers' batching runs in its own thread, and autocast would cast every weight again for each token.
    """
    before, copies = model.dtype, {}
    wide: list[tuple[nn.Module, str, nn.Parameter]] = []
    if before != dtype:
        owned = ((m, name, p) for m in model.modules() for name, p in m._parameters.items())
        wide = [(module, name, p) for module, name, p in owned if p is not None and p.dtype == before]
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
    """The dtype in which the model is loaded. auto: bfloat16 on a GPU in mode lora, else float32."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if device.type == "cuda" and config.policy.mode == "lora" else torch.float32
