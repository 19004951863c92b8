"""A vocabulary split over a process group, as in Megatron-LM (arXiv 1909.08053, section 3): statistics and gradients.

Rank r of p holds rows [r V / p, (r + 1) V / p) of the weight and of the bias; hidden and target are the same on all
ranks. A rank computes its own columns. Two things cross ranks: the four running numbers of each row, gathered and added
in the order of the ranks, so that all ranks have the same bits, and the gradient of hidden, which is summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import values_are_read
from .contract import Inputs, checks


class Shard:
    """This rank's part of the vocabulary. Without a group: all of it."""

    def __init__(self, inputs: Inputs, group: Any) -> None:
        self._group = group
        self.size = 1 if group is None else group.size()
        self.columns = inputs.weight.shape[0]
        self.first = 0 if group is None else group.rank() * self.columns  # the vocabulary entry of weight[0]

    def local(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are in this part, and their rows of the weight (any row for the others)."""
        index = target - self.first
        return (index >= 0) & (index < self.columns), index.clamp(0, self.columns - 1)

    def merged(self, state: Tensor, target: Tensor) -> Tensor:
        """The running numbers [4, rows] of the whole vocabulary from those of this part."""
        if self.size == 1:
            return state
        parts = state.new_empty(self.size, *state.shape)
        torch.distributed.all_gather(list(parts), state, group=self._group)
        greatest, total, weighted, chosen = parts.unbind(1)  # each [size, rows]
        top = greatest.amax(dim=0)
        drop = greatest - top
        fade = drop.exp()
        owner = (target // self.columns).clamp(0, self.size - 1)[None]  # no other rank's number for it is not NaN
        return torch.stack([
            top, (fade * total).sum(dim=0), (fade * (weighted + total * drop)).sum(dim=0), chosen.gather(0, owner)[0]
        ])  # fmt: skip

    def add_(self, partial: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(partial, group=self._group)


def check_group(inputs: Inputs, group: Any) -> None:
    """Raise ValueError for something that is no group of this process, and if `values_are_read` for uneven parts."""
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        checks.refuse("group", "a torch.distributed.ProcessGroup or None", type(group).__name__)
    if not values_are_read(inputs.target):
        return
    size = torch.tensor([inputs.weight.shape[0]], device=inputs.hidden.device)
    sizes = size.new_empty(group.size())
    torch.distributed.all_gather(list(sizes.split(1)), size, group=group)
    if bool((sizes != size).any()):
        checks.refuse("weight", "the same number of rows on every rank of the group", sizes.tolist())
