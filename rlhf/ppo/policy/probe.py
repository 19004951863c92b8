"""Check on a few tokens how a causal language model computes its logits, and whether it reads packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....engine.config import position_offset
from ....engine.eval_mode import evaluating
from ....engine.likelihood import LanguageHead, LogitRule
from ...models.causal_lm import has_values


def logit_rule(model: Any) -> LogitRule:
    """Find out how `model` computes its logits.

    Raises:
        ValueError: for logits that `linear_logprob` cannot compute.
    """
    head = LanguageHead.of(model)
    if has_values(head.weight):
        _check_rule(model, head.rule)
    return head.rule


def _tolerance(dtype: torch.dtype) -> float:
    """Tolerance relative to the largest number: a few roundings of the dtype; a wrong function differs by more."""
    return 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps


def _ids(model: Any, count: int) -> Tensor:
    """[count] token ids of the model's vocabulary, none of them padding."""
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, size, (count,), generator=generator)
    padding = getattr(model.config, "pad_token_id", None)
    if isinstance(padding, int):
        ids = torch.where(ids == padding, (ids + 1) % size, ids)
    return ids.to(model.device)


@torch.no_grad()
def _check_rule(model: Any, rule: LogitRule) -> None:
    ids = _ids(model, 9)[None]
    with evaluating(model):
        theirs = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    weight = model.get_output_embeddings().weight
    targets = torch.arange(len(hidden), device=hidden.device) % weight.shape[0]
    ours = LanguageHead(weight, rule).logprobs(hidden.to(weight.dtype), targets)
    wanted = theirs.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    scale = theirs.abs().amax().clamp_min(1.0)
    if not bool(((ours - wanted).abs() <= _tolerance(weight.dtype) * scale).all()):
        raise ValueError(
            "model: expected logits that are the last hidden states times the head's weight, scaled or capped as "
            f"the configuration says, got others from {type(model).__name__}"
        )


@torch.no_grad()
def why_not_packed(model: Any, takes_positions: bool) -> str | None:
    """Why `model` cannot read several sequences packed into one row, distinguished by positions; None if it can.

    The model reads three short sequences, each alone and all in one row.
    """
    if not takes_positions:
        return f"{type(model).__name__} takes no position_ids"
    if not has_values(model.get_input_embeddings().weight):
        return None
    offset = position_offset(model.config)
    lengths = (5, 1, 7)
    parts = _ids(model, sum(lengths)).split(list(lengths))
    positions = [torch.arange(n, device=model.device) + offset for n in lengths]

    def read(ids: Tensor, position_ids: Tensor) -> Tensor:
        out = model.base_model(input_ids=ids[None], position_ids=position_ids[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state[0].float()
        return hidden

    with evaluating(model):
        alone = torch.cat([read(*sequence) for sequence in zip(parts, positions, strict=True)])
        packed = read(torch.cat(parts), torch.cat(positions))
    largest = alone.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    if bool(((packed - alone).abs() <= _tolerance(model.dtype) * largest).all()):
        return None
    return f"{type(model).__name__} mixes sequences that are packed into one row"
