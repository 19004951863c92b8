"""Run `linear_logprob` on CUDA, compiled for ROCm: library products, and two Triton kernels over their tiles.

The vendor's library multiplies at the hardware's rate, with fp32 results from 16-bit operands. The kernels read a tile
once in the forward, and read and write it once in the backward. CPU tensors work only under Triton's interpreter, which
the tests use.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .chunked import run_backward, run_forward
from .configs import tile_config
from .contract import Grads, Inputs, Needs, OutputGrads, Results, Saved
from .torch_tiles import Emit, Kept, RowTerms
from .triton_kernels import gradient_kernel, statistics_kernel


class TritonTiles:
    """The two methods of TorchTiles as Triton kernels. They leave the tile as it is."""

    device_kind = "gpu"

    def __init__(self, inputs: Inputs, work: object) -> None:
        self._bias, self._ignore_index = inputs.bias, inputs.ignore_index
        self._options: dict[str, Any] = {
            "inverse_temperature": 1.0 / inputs.temperature,
            "softcap": 0.0 if inputs.softcap is None else float(inputs.softcap),
            "SOFTCAP": inputs.softcap is not None,
            "ACC": tl.float64 if inputs.accumulator == torch.float64 else tl.float32,
        }

    def statistics(
        self, tile: Tensor, target: Tensor, column: int, offset: int, state: Tensor, emit: Emit | None
    ) -> None:
        """Add a contiguous tile of raw logits to `state` [4, rows]."""
        rows, columns = tile.shape
        config = tile_config(columns)
        powers, scale = (None, None) if emit is None else emit[:2]
        launch(
            statistics_kernel, (rows,), config, tile.device,
            tile=tile, bias=self._bias_of(column, columns), target=target, state=state, powers=powers, scale=scale,
            columns=columns, powers_stride=0 if powers is None else powers.stride(0), column=offset + column, rows=rows,
            FIRST=column == 0, DERIVATIVE=emit is not None and emit.derivative, BLOCK=config.block_dim, **self._options,
        )  # fmt: skip

    def gradient(
        self, source: Tensor | Kept, target: Tensor, column: int, offset: int, terms: RowTerms, out: Tensor
    ) -> None:
        """Write the loss's derivative by a tile's logits to `out` [rows, columns]; the vectors of `terms` and a tile of
        logits are contiguous.
        """
        rows, columns = out.shape
        config = tile_config(columns)
        tile, peak, logprob = source if isinstance(source, Kept) else (source, None, None)
        launch(
            gradient_kernel, (rows,), config, tile.device,
            source=tile, bias=None if isinstance(source, Kept) else self._bias_of(column, columns), peak=peak,
            logprob=logprob, slopes=out, target=target, **terms._asdict(), columns=columns,
            source_stride=tile.stride(0), slopes_stride=out.stride(0), column=offset + column,
            ignore_index=self._ignore_index or 0,
            IGNORE=self._ignore_index is not None, BLOCK=config.block_dim, **self._options,
        )  # fmt: skip

    def _bias_of(self, column: int, columns: int) -> Tensor | None:
        return None if self._bias is None else self._bias[column : column + columns]


def scored_rows(inputs: Inputs) -> None:
    """All rows: ignored ones are masked, because the host would have to wait for the number of the others."""


def forward(inputs: Inputs, rows: Tensor | None, keep: int = 0, group: Any = None) -> Results:
    """Outputs of target's shape: a product and a launch a tile."""
    return run_forward(inputs, rows, keep, group, TritonTiles)


def backward(
    grads: OutputGrads, inputs: Inputs, rows: Tensor | None, saved: Saved, needs: Needs, group: Any = None
) -> Grads:
    """Gradients of hidden, weight and bias: up to three products and a launch a tile."""
    return run_backward(grads, inputs, rows, saved, needs, group, TritonTiles)
