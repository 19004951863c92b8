"""Move the padding of a batch to the right, and find the token of each sequence that the heads read."""

from __future__ import annotations

import torch
from torch import Tensor


def check_mask(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError for ids that are not [B, T], or a mask of another shape or (on the CPU) with an empty row."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"EnsembleRewardModel: input_ids: expected [B, T] with T above 0, got {list(input_ids.shape)}")
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"EnsembleRewardModel: attention_mask: expected input_ids' shape {list(input_ids.shape)}, "
            f"got {list(attention_mask.shape)}"
        )
    # on the CPU only: a test of device memory would stall the stream, and torch.compile cannot trace it
    if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        empty = attention_mask.ne(0).any(1).logical_not()
        if bool(empty.any()):
            row = int(empty.int().argmax())
            raise ValueError(
                f"EnsembleRewardModel: attention_mask: expected a token in every row, got none in row {row}"
            )


def right_padded(
    input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, padding_id: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move each row's attended tokens to its front and write `padding_id` behind them; all tensors are [B, T].

    Every trunk then counts positions as it does for the row alone, whatever its rule: from 0, from the padding index
    + 1, by the mask, or not at all. A recurrent trunk reads no padding before an attended token.
    """
    attended = attention_mask.ne(0)
    order = attended.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    attended = attended.gather(1, order)
    ids = input_ids.gather(1, order).masked_fill(attended.logical_not(), padding_id)
    if position_ids is not None:
        position_ids = position_ids.expand_as(order).gather(1, order)
    return ids, attended.to(torch.int64), position_ids


def response_mask(
    input_ids: Tensor, attention_mask: Tensor | None, start: Tensor, rows: Tensor, *, first: bool
) -> Tensor:
    """[B, T] bool: the response's tokens, from `start` to the last token that is read; at least that last one.

    Args:
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T]; None: no padding.
        start: [B] int64, the place of each response's first token.
        rows: of `pooled_rows`; with `first`, the last token that is read is the last attended one.
    """
    batch, length = input_ids.shape
    place = torch.arange(length, device=input_ids.device)
    if not first:
        last = rows - torch.arange(batch, device=rows.device) * length
    elif attention_mask is None:
        last = torch.full_like(rows, length - 1)
    else:
        last = attention_mask.sum(1) - 1
    return (place >= torch.minimum(start, last)[:, None]) & (place <= last[:, None])


def check_start(input_ids: Tensor, attention_mask: Tensor | None, start: Tensor) -> None:
    """Raise ValueError for a response_start that is not [B] int64, or (on the CPU) lies outside its sequence."""
    if start.shape != input_ids.shape[:1] or start.dtype != torch.int64:
        raise ValueError(
            f"EnsembleRewardModel: response_start: expected [{len(input_ids)}] int64, got {list(start.shape)} "
            f"{str(start.dtype).removeprefix('torch.')}"
        )
    if start.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = input_ids.shape[1] if attention_mask is None else attention_mask.ne(0).sum(1).to(start.device)
        outside = (start < 0) | (start >= lengths)
        if bool(outside.any()):
            row = int(outside.int().argmax())
            raise ValueError(
                "EnsembleRewardModel: response_start: expected the place of a token among the attended ones of its "
                f"row, counted from 0, got {int(start[row])} in row {row}"
            )


def pooled_rows(input_ids: Tensor, attention_mask: Tensor | None, *, first: bool, skipped: int | None) -> Tensor:
    """The row of hidden states, flattened to [B * T, D], that the heads read for each sequence: [B] int64.

    Args:
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T]; None: no padding.
        first: read the first attended token instead of the last.
        skipped: read the last attended token other than this id; the first token of a row without another.
    """
    batch, length = input_ids.shape
    start = torch.arange(batch, device=input_ids.device) * length
    if first:
        return start
    if attention_mask is None and skipped is None:
        return start + (length - 1)
    counts = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.ne(0)
    if skipped is not None:
        counts = counts & input_ids.ne(skipped)
    return start + torch.where(counts, torch.arange(length, device=input_ids.device), 0).amax(1)
