"""Check, before a run begins, that a model can be sampled from, and which engines suit it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...engine.logits import has_values
from ..models.causal_lm import SHARING_MODELS, cache_of, causal_lm, next_logits
from .shared_prefix import decoder


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Raise ValueError unless the logits are the output layer on the last hidden states, scaled and capped (config).

    Engines compute logits in this way, and the update computes probabilities from it.
    """
    lm = causal_lm(model)
    if not has_values(lm.get_input_embeddings().weight):
        return
    ids = torch.arange(2, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    want = lm(input_ids=ids, use_cache=False).logits[:, -1].float()
    got = next_logits(lm, lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]).float()
    scale = max(float(want.abs().max()), 1e-6)
    if not float((got - want).abs().max()) <= 0.02 * scale:  # a few roundings of bfloat16
        raise ValueError(
            f"model: expected logits that are the output layer on the last hidden state, got others from "
            f"{type(lm).__name__}, whose probabilities would be wrong"
        )


@torch.no_grad()
def caches_attention_alone(model: Any) -> bool:
    """Return whether every layer caches keys and values only, as engines static and continuous assume.

    Layers of linear attention and of state spaces cache a state instead.
    """
    lm = causal_lm(model)
    if lm.config.model_type in SHARING_MODELS or not has_values(lm.get_input_embeddings().weight):
        return True
    ids = torch.ones(1, 2, dtype=torch.int64, device=lm.device)
    cache = cache_of(lm.base_model(input_ids=ids, use_cache=True))
    layers = getattr(cache, "layers", None) or [None]
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    # a cache with a class of its own may keep more beside its layers
    return type(cache).__module__ == DynamicLayer.__module__ and all(type(layer) in kinds for layer in layers)


def takes_padding(model: Any) -> bool:
    """Return whether prompts of several lengths can be decoded in one batch, padded on the left.

    Raises:
        ValueError: for a model that cannot decode even prompts of one length: its hidden states, token by token with a
            cache, are not those of one pass.
    """
    lm = causal_lm(model)
    if lm.config.model_type in SHARING_MODELS or not has_values(lm.get_input_embeddings().weight):
        return True  # the tests compare these families with one pass
    vocab = lm.config.get_text_config().vocab_size
    if _why_not(lm, vocab, (5, 3)) is None:
        return True
    reason = _why_not(lm, vocab, (4, 4))
    if reason is not None:
        raise ValueError(
            f"model: expected a language model that transformers decodes token by token, got {lm.config.model_type}, "
            f"which cannot be sampled from: {reason}"
        )
    return False


@torch.no_grad()
def _why_not(lm: Any, vocab: int, lengths: tuple[int, int]) -> str | None:
    """How decoding two samples of each of two prompts differs from one pass over each; None: not at all."""
    ids = [(torch.arange(length + 2) * 7 + number + 4) % vocab for number, length in enumerate(lengths)]
    want = torch.stack([_one_pass(lm, row) for row in ids]).repeat_interleave(2, dim=0)
    prompts = [row[:-2].tolist() for row in ids]
    fed = torch.stack([row[-2:] for row in ids]).repeat_interleave(2, dim=0)
    try:
        with decoder(lm, prompts, 2, 2) as batch:
            got = torch.stack([batch.feed(fed[:, 0]), batch.feed(fed[:, 1])], dim=1).float()
    except Exception as error:  # the code of any family may raise any error
        reason = " ".join(str(error).split())[:200]
        return reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
    off = float((got - want).norm() / want.norm())
    # half precision rounds, and may route a token to other experts; hidden states of another text differ by more
    if off <= (0.01 if lm.dtype == torch.float32 else 0.1):
        return None
    return f"its hidden states are {off:.0%} off"


def _one_pass(lm: Any, ids: Tensor) -> Tensor:
    """[2, D] hidden states after the last two of `ids`."""
    hidden: Tensor = lm.base_model(input_ids=ids[None].to(lm.device), use_cache=False).last_hidden_state
    return hidden[0, -2:].float()
