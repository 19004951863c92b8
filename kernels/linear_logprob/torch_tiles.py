"""Statistics and gradient of a tile of logits in torch: few passes, in place, while the tile is in the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Inputs
from .products import Workspace


class Emit(NamedTuple):
    """Where `statistics` also writes the powers exp(x - m) of a tile; m is the row's greatest logit so far.

    values      [rows, columns], contiguous last dimension. `derivative`: times the cap's slope, and 0 at the target.
    scale       [rows]: m; `derivative`: the factor exp(old m - m) that makes sums of earlier tiles relative to m.
    """

    values: Tensor
    scale: Tensor
    derivative: bool


class Kept(NamedTuple):
    """A tile's numerators, in place of its logits: values [rows, columns] = exp(x - peak), peak and logprob [rows]."""

    values: Tensor
    peak: Tensor
    logprob: Tensor


class RowTerms(NamedTuple):
    """What a tile's derivative needs of each row [rows]: the saved outputs, and the gradients of the loss by the three
    outputs, divided by the temperature; None stands for zero.
    """

    entropy: Tensor
    lse: Tensor
    d_logprob: Tensor | None
    d_entropy: Tensor | None
    d_lse: Tensor | None

    def part(self, start: int, end: int) -> RowTerms:
        """The terms of rows start .. end - 1."""
        return RowTerms(*(None if t is None else t[start:end] for t in self))  # type: ignore[arg-type]


class TorchTiles:
    """The operations on the tiles of one call. TritonTiles in triton.py has the same two methods."""

    device_kind = "cpu"

    def __init__(self, inputs: Inputs, work: Workspace) -> None:
        self._work, self._bias = work, inputs.bias
        self._temperature, self._softcap = inputs.temperature, inputs.softcap

    def statistics(
        self, tile: Tensor, target: Tensor, column: int, offset: int, state: Tensor, emit: Emit | None
    ) -> None:
        """Add a tile of raw logits to `state` [4, rows]. Overwrites the tile. Its first column is row `column` of the
        weight and vocabulary entry `offset + column`.

        State: greatest logit m, sum of exp(x - m), sum of exp(x - m) (x - m), the target's logit (NaN: not found yet).
        """
        greatest, total, weighted, chosen = state
        self._cap_and_temper(tile, column)
        top = tile.amax(dim=1)
        if column == 0:
            greatest.copy_(top)
            total.zero_()
            weighted.zero_()
            chosen.fill_(float("nan"))
        here, index = _target_in_tile(target, offset + column, tile.shape[1])
        torch.where(here, tile.gather(1, index).squeeze(1), chosen, out=chosen)
        cap_slope = self._cap_slope(tile) if emit is not None and emit.derivative else None
        new = torch.maximum(greatest, top)
        drop = greatest - new
        greatest.copy_(new)
        tile.sub_(new[:, None])
        powers = torch.exp(tile, out=self._work("powers", tile.shape, tile.dtype))
        fade = drop.exp()
        weighted.add_(total * drop).mul_(fade).add_(tile.mul_(powers).sum(dim=1))
        total.mul_(fade).add_(powers.sum(dim=1))
        if emit is None:
            return
        emit.scale.copy_(fade if emit.derivative else new)
        if emit.derivative:
            if cap_slope is not None:
                powers.mul_(cap_slope)
            powers.scatter_(1, index, torch.where(here, 0, powers.gather(1, index).squeeze(1))[:, None])
        emit.values.copy_(powers)

    def gradient(
        self, source: Tensor | Kept, target: Tensor, column: int, offset: int, terms: RowTerms, out: Tensor
    ) -> None:
        """Write the loss's derivative by a tile's logits to `out` [rows, columns]. Raw logits are overwritten."""
        lse = terms.lse
        here, index = _target_in_tile(target, offset + column, out.shape[1])
        if isinstance(source, Kept):
            below = self._work("tile", out.shape, lse.dtype).copy_(source.values)
            below.log_().clamp_(min=-1e4)  # the logarithm of 0: any finite number will do, because p = 0
            below.add_((source.peak - lse)[:, None])
            exact = torch.where(here, source.logprob, below.gather(1, index).squeeze(1))
            below.scatter_(1, index, exact[:, None])
            cap_slope = self._cap_slope(below + lse[:, None])
        else:
            below = source
            self._cap_and_temper(below, column)
            cap_slope = self._cap_slope(below)
            below.sub_(lse[:, None])
        slope = torch.exp(below, out=self._work("powers", below.shape, below.dtype))
        factor = torch.zeros_like(lse) if terms.d_lse is None else terms.d_lse
        if terms.d_logprob is not None:
            factor = factor - terms.d_logprob
        if terms.d_entropy is None:
            slope.mul_(factor[:, None])
        else:
            factor = factor - terms.d_entropy * terms.entropy
            slope.mul_(below.mul_(-terms.d_entropy[:, None]).add_(factor[:, None]))
        if terms.d_logprob is not None:
            slope.scatter_add_(1, index, torch.where(here, terms.d_logprob, 0)[:, None])
        if cap_slope is not None:
            slope.mul_(cap_slope)
        out.copy_(slope)

    def _cap_and_temper(self, tile: Tensor, column: int) -> None:
        if self._bias is not None:
            tile.add_(self._bias[column : column + tile.shape[1]])
        if self._softcap is not None:
            tile.div_(self._softcap).tanh_().mul_(self._softcap / self._temperature)
        elif self._temperature != 1:
            tile.div_(self._temperature)

    def _cap_slope(self, tile: Tensor) -> Tensor | None:
        """1 - tanh^2 from capped, tempered logits, in scratch memory; None without a cap."""
        if self._softcap is None:
            return None
        square = torch.square(tile, out=self._work("cap", tile.shape, tile.dtype))
        return square.mul_(-((self._temperature / self._softcap) ** 2)).add_(1)


def _target_in_tile(target: Tensor, column: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this tile [rows], and its column [rows, 1] (any column for the others)."""
    here = target - column
    return (here >= 0) & (here < columns), here.clamp(0, columns - 1)[:, None]
