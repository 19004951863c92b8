"""Look inside a causal language model: the model under its adapters, and logits from hidden states."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ...engine.likelihood import logit_scale

# families whose layers pass unknown keyword arguments to the attention function and use a causal mask only
SHARING_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def causal_lm(model: Any) -> Any:
    """Return the causal language model inside a peft wrapper, with its adapters; any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# transformers 5.24 calls every cache `cache`; before, Mamba's was `cache_params` and all others `past_key_values`
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_argument(trunk: Any) -> str:
    """Return the name of the cache argument of a transformers model's forward pass."""
    names = inspect.signature(trunk.forward).parameters
    return next((name for name in _CACHE_NAMES if name in names), "past_key_values")


def cache_of(output: Any) -> Any:
    """Return the cache in an output of transformers; None if it has none."""
    known = output.keys()  # the old names still exist as attributes, but reading them warns
    return next((output[name] for name in _CACHE_NAMES if name in known), None)


def next_logits(model: Any, hidden: Tensor) -> Tensor:
    """[N, D] final hidden states -> [N, V] logits of `causal_lm(...)`, scaled and capped as its config says."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    scale = logit_scale(model.config)
    if scale != 1:
        logits = logits * scale
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
