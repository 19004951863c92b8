"""Check on a few tokens whether a causal language model reads packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....engine.config import position_offset
from ....engine.eval_mode import evaluating
from ....engine.logits import has_values, probe_ids, probe_tolerance


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
    parts = probe_ids(model, sum(lengths)).split(list(lengths))
    positions = [torch.arange(n, device=model.device) + offset for n in lengths]

    def read(ids: Tensor, position_ids: Tensor) -> Tensor:
        out = model.base_model(input_ids=ids[None], position_ids=position_ids[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state[0].float()
        return hidden

    with evaluating(model):
        alone = torch.cat([read(*sequence) for sequence in zip(parts, positions, strict=True)])
        packed = read(torch.cat(parts), torch.cat(positions))
    largest = alone.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    if bool(((packed - alone).abs() <= probe_tolerance(model.dtype) * largest).all()):
        return None
    return f"{type(model).__name__} mixes sequences that are packed into one row"
