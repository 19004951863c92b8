"""One call of `linear_logprob`: its chunks of rows and of the vocabulary, its scratch memory, its rows in `hidden`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .configs import Plan, kept_columns, plan
from .contract import Inputs
from .parallel import Shard
from .products import Workspace, operand_dtype, product


class Call:
    """One forward or backward. `rows` as in contract.py; `narrow` as in configs.py.

    `kept`: how many of the first rows have kept numerators; no chunk of rows has both kinds. None: there are none,
    and the tiles are the plan's.
    """

    def __init__(
        self,
        inputs: Inputs,
        rows: Tensor | None,
        tiles: type[Any],
        group: Any,
        narrow: bool = False,
        kept: int | None = None,
    ) -> None:
        hidden, weight = inputs.hidden, inputs.weight
        self.inputs, self.rows, self.shard = inputs, rows, Shard(inputs, group)
        self.accumulator = inputs.accumulator
        self.operand = operand_dtype(inputs.operand, self.accumulator, hidden.device)
        self.work = Workspace(hidden.device)
        self.tiles = tiles(inputs, self.work)
        self.dim, self.vocabulary = hidden.shape[-1], weight.shape[0]
        self.count = inputs.target.numel() if rows is None else rows.shape[0]
        kind = tiles.device_kind
        self.plan: Plan = plan(self.count, self.dim, self.vocabulary, self.operand, self.accumulator, kind, narrow)
        self.kept = 0 if kept is None else min(kept, self.count)
        if kept is not None:
            self.plan = self.plan._replace(columns=kept_columns(self.vocabulary, kind))
        self.flat: Tensor | None = None
        with contextlib.suppress(RuntimeError):  # leading dimensions that do not merge: gather chunk by chunk
            self.flat = hidden.view(-1, self.dim)
        flat_target = inputs.target.reshape(-1).contiguous()  # a view of one dimension keeps its stride
        self.target = flat_target if rows is None else flat_target[rows]
        self.ignored: Tensor | None = None  # [count] bool, if some rows may be
        if kind == "gpu" and inputs.ignore_index is not None:
            self.ignored = self.target == inputs.ignore_index

    def row_chunks(self) -> Iterator[tuple[int, int]]:
        for first, last in ((0, self.kept), (self.kept, self.count)):
            for start in range(first, last, self.plan.rows):
                yield start, min(last, start + self.plan.rows)

    def columns(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The vocabulary's tiles [first, last) from `start` to `end`, a multiple of the tile's width."""
        end = self.vocabulary if end is None else end
        for column in range(start, end, self.plan.columns):
            yield column, min(end, column + self.plan.columns)

    def blocks(self, width: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield [first, last) of the vocabulary, `width` at a time, and the weight's rows there as operands."""
        for start in range(0, self.vocabulary, width):
            part = self.inputs.weight[start : start + width]
            if part.dtype != self.operand:
                part = self.work("weight", part.shape, self.operand).copy_(part)
            yield start, start + part.shape[0], part

    def hidden_chunk(self, start: int, end: int, clean: bool = False) -> Tensor:
        """The hidden states of rows start .. end - 1 as operands [end - start, D]. `clean`: ignored rows are 0, because
        a NaN there would pass a product with a slope of 0.
        """
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
        masked = clean and self.ignored is not None
        if part.dtype != self.operand or masked:
            part = self.work("operand", part.shape, self.operand).copy_(part)
        return self.masked_(part, start, end) if masked else part

    def masked_(self, values: Tensor, start: int, end: int) -> Tensor:
        """Set ignored rows to 0, in place. `values` [end - start] or [end - start, D] are of rows start .. end - 1."""
        if self.ignored is None:
            return values
        ignored = self.ignored[start:end]
        return values.masked_fill_(ignored if values.dim() == 1 else ignored[:, None], 0)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The raw logits [rows, columns] of a tile, in scratch memory, without the bias."""
        tile = self.work("tile", (hidden.shape[0], weight.shape[0]), self.accumulator)
        product(hidden, weight.T, tile, False, self.work)
        return tile

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Three outputs of target's shape, and for each the memory [self.count] to write its rows to. (An output that
        is a view of that memory could not be changed in place under autograd.)
        """
        new = self.inputs.hidden.new_empty if self.rows is None else self.inputs.hidden.new_zeros
        found = [new(self.inputs.target.shape, dtype=self.accumulator) for _ in range(3)]
        if self.rows is None:
            return found, [f.view(-1) for f in found]
        return found, [f.new_empty(self.count) for f in found]

    def spread(self, values: Tensor, output: Tensor) -> None:
        """Put the rows of `outputs` in their places; ignored ones are 0."""
        if self.rows is None:
            self.masked_(values, 0, self.count)
        else:
            output.view(-1).index_copy_(0, self.rows, values)

    def gathered(self, values: Tensor) -> Tensor:
        """Values of target's shape as [count], contiguous, in the accumulator's dtype; 0 in ignored rows."""
        flat = values.reshape(-1) if self.rows is None else values.reshape(-1)[self.rows]
        flat = flat.to(self.accumulator).contiguous()
        return flat if self.ignored is None else flat.masked_fill(self.ignored, 0)

    def new(self, like: Tensor, complete: bool) -> Tensor:
        """A gradient's memory: uninitialised if all of it will be written (`complete`), else zeros."""
        make = like.new_empty if complete and self.count else like.new_zeros
        return make(like.shape)

    def store(self, rows: Tensor, into: Tensor, start: int, end: int) -> None:
        """Copy a chunk [end - start, D] to its rows of `into` [..., D], rounding once."""
        flat = into.view(-1, self.dim)
        if self.rows is None:
            flat[start:end].copy_(rows)
            return
        if flat.dtype != rows.dtype:  # the gathered rows are not read again
            rows = self.work("rows", rows.shape, flat.dtype).copy_(rows)
        flat.index_copy_(0, self.rows[start:end], rows)


def empty_numerators(inputs: Inputs, keep: int, device_kind: str) -> tuple[Tensor, Tensor]:
    """The memory of `kept` and `peaks` (contract.py) within `keep` bytes of numerators. The number of rows may be
    symbolic.
    """
    operand = operand_dtype(inputs.operand, inputs.accumulator, inputs.hidden.device)
    vocabulary, new = inputs.weight.shape[0], inputs.hidden.new_empty
    rows = torch.sym_min(inputs.target.numel(), keep // (vocabulary * operand.itemsize))
    tiles = -(-vocabulary // kept_columns(vocabulary, device_kind))
    return new(rows, vocabulary, dtype=operand), new(tiles + 1, rows, dtype=inputs.accumulator)


def _coordinates(positions: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Row-major positions as an index into each dimension. (torch.unravel_index would copy the shape to the device.)"""
    found = []
    for size in reversed(shape):
        found.append(positions % size)
        positions = positions // size
    return tuple(reversed(found))


def without_autocast(device: torch.device) -> Any:
    """A context that disables autocast, which would cast the products' operands."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
