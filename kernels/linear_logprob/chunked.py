"""`linear_logprob` tile by tile: the loops that all devices share, and the execution in torch.

The outer loop is over chunks of rows, the inner loop over chunks of the vocabulary. The forward keeps four running
numbers a row, the backward the hidden gradient of a chunk of rows; no tensor has T x V elements. torch_tiles.py and
triton.py compute on a tile of logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .configs import Plan, plan
from .contract import Grads, Inputs, Needs, OutputGrads, Outputs
from .products import Workspace, operand_dtype, product
from .torch_tiles import TorchTiles


class _Call:
    """One forward or backward: its tiles, its scratch memory, and its rows in `hidden`."""

    def __init__(self, inputs: Inputs, rows: Tensor | None, tiles: type[Any]) -> None:
        hidden, weight = inputs.hidden, inputs.weight
        self.inputs, self.rows = inputs, rows
        self.accumulator = inputs.accumulator
        self.operand = operand_dtype(inputs.operand, self.accumulator, hidden.device)
        self.work = Workspace(hidden.device)
        self.tiles = tiles(inputs, self.work)
        self.dim, self.vocabulary = hidden.shape[-1], weight.shape[0]
        self.count = inputs.target.numel() if rows is None else rows.shape[0]
        self.plan: Plan = plan(self.count, self.dim, self.vocabulary, self.operand, self.accumulator, tiles.device_kind)
        self.flat: Tensor | None = None
        with contextlib.suppress(RuntimeError):  # leading dimensions that do not merge: gather chunk by chunk
            self.flat = hidden.view(-1, self.dim)
        flat_target = inputs.target.reshape(-1).contiguous()  # a view of one dimension keeps its stride
        self.target = flat_target if rows is None else flat_target[rows]

    def row_chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.count, self.plan.rows):
            yield start, min(self.count, start + self.plan.rows)

    def weight_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first vocabulary entry, the weight's rows [columns, D] as operands)."""
        for start in range(0, self.vocabulary, self.plan.columns):
            part = self.inputs.weight[start : start + self.plan.columns]
            if part.dtype != self.operand:
                part = self.work("weight", part.shape, self.operand).copy_(part)
            yield start, part

    def hidden_chunk(self, start: int, end: int) -> Tensor:
        """The hidden states of rows start .. end - 1 as operands [end - start, D]."""
        hidden, positions = self.inputs.hidden, None if self.rows is None else self.rows[start:end]
        if self.flat is None:
            if positions is None:
                positions = torch.arange(start, end, device=hidden.device)
            part = hidden[_coordinates(positions, hidden.shape[:-1])]
        elif positions is None:
            part = self.flat[start:end]
        else:
            part = self.work("rows", (end - start, self.dim), hidden.dtype)
            torch.index_select(self.flat, 0, positions, out=part)
        if part.dtype != self.operand:
            part = self.work("operand", part.shape, self.operand).copy_(part)
        return part

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The raw logits [rows, columns] of a tile, in scratch memory."""
        tile = self.work("tile", (hidden.shape[0], weight.shape[0]), self.accumulator)
        product(hidden, weight.T, tile, False, self.work)
        return tile

    def spread(self, values: Tensor) -> Tensor:
        """Values [count] in target's shape, 0 at ignored positions."""
        shape = self.inputs.target.shape
        if self.rows is None:
            return values.view(shape)
        return values.new_zeros(self.inputs.target.numel()).index_copy_(0, self.rows, values).view(shape)

    def gathered(self, values: Tensor) -> Tensor:
        """Values of target's shape as [count], contiguous, in the accumulator's dtype."""
        flat = values.reshape(-1) if self.rows is None else values.reshape(-1)[self.rows]
        return flat.to(self.accumulator).contiguous()


def _coordinates(positions: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Row-major positions as an index into each dimension. (torch.unravel_index would copy the shape to the device.)"""
    found = []
    for size in reversed(shape):
        found.append(positions % size)
        positions = positions // size
    return tuple(reversed(found))


def _without_autocast(device: torch.device) -> Any:
    """A context that disables autocast, which would cast the products' operands."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def run_forward(inputs: Inputs, rows: Tensor | None, tiles: type[Any]) -> Outputs:
    """(logprob, entropy, lse) through `tiles.statistics`."""
    call = _Call(inputs, rows, tiles)
    new = inputs.hidden.new_empty
    found = tuple(new(call.count, dtype=call.accumulator) for _ in range(3))
    with _without_autocast(inputs.hidden.device):
        for start, end in call.row_chunks():
            hidden = call.hidden_chunk(start, end)
            state = call.work("state", (4, end - start), call.accumulator)
            outputs = tuple(f[start:end] for f in found)
            for column, weight in call.weight_chunks():
                call.tiles.statistics(call.logits(hidden, weight), call.target[start:end], column, state, outputs)
    return tuple(call.spread(f) for f in found)  # type: ignore[return-value]


def run_backward(
    grads: OutputGrads,
    inputs: Inputs,
    rows: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    needs: Needs,
    tiles: type[Any],
) -> Grads:
    """(grad_hidden, grad_weight) through `tiles.gradient`: recompute each tile's logits, then up to two products."""
    need_hidden, need_weight = needs
    call = _Call(inputs, rows, tiles)
    new_hidden = inputs.hidden.new_empty if rows is None and call.count else inputs.hidden.new_zeros
    grad_hidden = new_hidden(inputs.hidden.shape) if need_hidden else None
    new_weight = inputs.weight.new_empty if call.count else inputs.weight.new_zeros
    grad_weight = new_weight(inputs.weight.shape) if need_weight else None
    if not any(needs) or call.count == 0:
        return grad_hidden, grad_weight
    # the temperature divides every gradient of the capped logits, so divide the outer gradients by it once
    outer = tuple(None if g is None else call.gathered(g) / inputs.temperature for g in grads)
    saved = call.gathered(entropy), call.gathered(lse)
    with _without_autocast(inputs.hidden.device):
        for start, end in call.row_chunks():
            hidden = call.hidden_chunk(start, end)
            into = _hidden_accumulator(call, grad_hidden, start, end)
            part = tuple(None if g is None else g[start:end] for g in outer)
            rest = (saved[0][start:end], saved[1][start:end], part, call.operand)
            for column, weight in call.weight_chunks():
                tile = call.logits(hidden, weight)
                slope = call.tiles.gradient(tile, call.target[start:end], column, *rest)
                if grad_weight is not None:
                    piece = grad_weight[column : column + weight.shape[0]]
                    product(slope.T, hidden, piece, start > 0, call.work)
                if into is not None:
                    product(slope, weight, into, column > 0, call.work)
            if grad_hidden is not None and into is not None:
                _store_hidden(call, into, grad_hidden, start, end)
    return grad_hidden, grad_weight


def _hidden_accumulator(call: _Call, grad_hidden: Tensor | None, start: int, end: int) -> Tensor | None:
    """The tensor that sums the rows' hidden gradient: the result if it has the accumulator's dtype, else scratch."""
    if grad_hidden is None:
        return None
    if call.rows is None and grad_hidden.dtype == call.accumulator:
        return grad_hidden.view(-1, call.dim)[start:end]
    return call.work("hidden gradient", (end - start, call.dim), call.accumulator)


def _store_hidden(call: _Call, total: Tensor, grad_hidden: Tensor, start: int, end: int) -> None:
    flat = grad_hidden.view(-1, call.dim)
    if call.rows is None:
        if flat.dtype != total.dtype:
            flat[start:end].copy_(total)
        return
    if flat.dtype != total.dtype:  # the gathered rows are not read again
        total = call.work("rows", total.shape, flat.dtype).copy_(total)
    flat.index_copy_(0, call.rows[start:end], total)


def forward(inputs: Inputs, rows: Tensor | None) -> Outputs:
    """(logprob, entropy, lse), each of target's shape, in torch."""
    return run_forward(inputs, rows, TorchTiles)


def backward(
    grads: OutputGrads, inputs: Inputs, rows: Tensor | None, entropy: Tensor, lse: Tensor, needs: Needs
) -> Grads:
    """Gradients of hidden and weight (None if not needed) from the gradients of the three outputs."""
    return run_backward(grads, inputs, rows, entropy, lse, needs, TorchTiles)
