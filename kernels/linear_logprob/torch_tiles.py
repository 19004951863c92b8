"""Statistics and gradient of a tile of logits in torch: few passes, in place, while the tile is in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Inputs
from .products import Workspace


class TorchTiles:
    """The operations on the tiles of one call. TritonTiles in triton.py has the same two methods."""

    device_kind = "cpu"

    def __init__(self, inputs: Inputs, work: Workspace) -> None:
        self._vocabulary, self._work = inputs.weight.shape[0], work
        self._temperature, self._softcap = inputs.temperature, inputs.softcap

    def statistics(self, tile: Tensor, target: Tensor, column: int, state: Tensor, found: tuple[Tensor, ...]) -> None:
        """Add a tile of raw logits to `state` [4, rows], and write `found` after the last one. Overwrites the tile.

        State: greatest logit m, sum of exp(x - m), sum of exp(x - m) (x - m), the target's logit. The third is relative
        to m, so that the entropy of a peaked distribution is not a difference of large numbers.
        """
        greatest, total, weighted, chosen = state
        self._cap_and_temper(tile)
        top = tile.amax(dim=1)
        if column == 0:
            greatest.copy_(top)
            total.zero_()
            weighted.zero_()
            chosen.fill_(float("nan"))  # remains if the target is not a token
        here, index = _target_in_tile(target, column, tile.shape[1])
        torch.where(here, tile.gather(1, index).squeeze(1), chosen, out=chosen)
        new = torch.maximum(greatest, top)
        drop = greatest - new
        greatest.copy_(new)
        tile.sub_(new[:, None])
        powers = torch.exp(tile, out=self._work("powers", tile.shape, tile.dtype))
        fade = drop.exp()
        weighted.add_(total * drop).mul_(fade).add_(tile.mul_(powers).sum(dim=1))
        total.mul_(fade).add_(powers.sum(dim=1))
        if column + tile.shape[1] == self._vocabulary:
            log_total = total.log()
            torch.sub(chosen - greatest, log_total, out=found[0])
            torch.sub(log_total, weighted / total, out=found[1])
            torch.add(greatest, log_total, out=found[2])

    def gradient(
        self,
        tile: Tensor,
        target: Tensor,
        column: int,
        entropy: Tensor,
        lse: Tensor,
        grads: tuple[Tensor | None, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        """The loss's derivative by a tile of raw logits, [rows, columns] of `dtype`; overwrites the tile.

        `grads`: of logprob, entropy and lse, each [rows] and divided by the temperature, or None.
        """
        d_logprob, d_entropy, d_lse = grads
        cap_slope = None
        self._cap_and_temper(tile)
        if self._softcap is not None:
            cap_slope = torch.square(tile, out=self._work("cap", tile.shape, tile.dtype))
            cap_slope.mul_(-((self._temperature / self._softcap) ** 2)).add_(1)
        tile.sub_(lse[:, None])
        slope = torch.exp(tile, out=self._work("powers", tile.shape, tile.dtype))
        factor = torch.zeros_like(lse) if d_lse is None else d_lse
        if d_logprob is not None:
            factor = factor - d_logprob
        if d_entropy is None:
            slope.mul_(factor[:, None])
        else:
            factor = factor - d_entropy * entropy
            slope.mul_(tile.mul_(-d_entropy[:, None]).add_(factor[:, None]))
        if d_logprob is not None:
            here, index = _target_in_tile(target, column, tile.shape[1])
            slope.scatter_add_(1, index, torch.where(here, d_logprob, 0)[:, None])
        if cap_slope is not None:
            slope.mul_(cap_slope)
        return slope if dtype == slope.dtype else self._work("slope", slope.shape, dtype).copy_(slope)

    def _cap_and_temper(self, tile: Tensor) -> None:
        if self._softcap is not None:
            tile.div_(self._softcap).tanh_().mul_(self._softcap / self._temperature)
        elif self._temperature != 1:
            tile.div_(self._temperature)


def _target_in_tile(target: Tensor, column: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this tile [rows], and its column [rows, 1] (any column for the others)."""
    here = target - column
    return (here >= 0) & (here < columns), here.clamp(0, columns - 1)[:, None]
