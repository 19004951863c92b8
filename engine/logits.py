"""Check on a few tokens that a causal language model's logits are the ones that `LanguageHead` computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .eval_mode import evaluating
from .likelihood import LanguageHead


def checked_head(model: Any, skips: Sequence[int] = ()) -> LanguageHead:
    """The head of a causal language model, after a comparison of its log-probabilities with the model's own logits.

    Some families compute more than their configuration says: a dense layer before the head, or a scale for each token.

    Raises:
        ValueError: for a model without a linear head, with a bias on it, or with logits of another kind.
    """
    head = LanguageHead.of(model, skips)
    if has_values(head.weight):
        _compare(model, head)
    return head


@torch.no_grad()
def _compare(model: Any, head: LanguageHead) -> None:
    ids = probe_ids(model, 9)[None]
    with evaluating(model):
        theirs = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    dtype = head.weight.dtype
    targets = torch.arange(len(hidden), device=hidden.device) % len(head.weight)
    ours = head.logprobs(hidden.to(dtype), targets)
    wanted = theirs.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    scale = theirs.abs().amax().clamp_min(1.0)
    if not bool(((ours - wanted).abs() <= probe_tolerance(dtype) * scale).all()):
        raise ValueError(
            "model: expected logits that are the last hidden states times the head's weight, scaled or capped as "
            f"the configuration says, got others from {type(model).__name__}"
        )


def probe_tolerance(dtype: torch.dtype) -> float:
    """Tolerance relative to the largest number: a few roundings of the dtype; a wrong function differs by more."""
    return 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps


def probe_ids(model: Any, count: int) -> Tensor:
    """[count] token ids of the model's vocabulary, none of them padding."""
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, size, (count,), generator=generator)
    padding = getattr(model.config, "pad_token_id", None)
    if isinstance(padding, int):
        ids = torch.where(ids == padding, (ids + 1) % size, ids)
    return ids.to(model.device)


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers; one on the meta device or under FakeTensorMode does not."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
