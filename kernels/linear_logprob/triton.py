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
from .contract import Grads, Inputs, Needs, OutputGrads, Outputs
from .triton_kernels import gradient_kernel, statistics_kernel


class TritonTiles:
    """The two methods of TorchTiles as Triton kernels. The derivative overwrites the tile, to save memory."""

    device_kind = "gpu"

    def __init__(self, inputs: Inputs, work: object) -> None:
        self._vocabulary = inputs.weight.shape[0]
        self._options: dict[str, Any] = {
            "inverse_temperature": 1.0 / inputs.temperature,
            "softcap": 0.0 if inputs.softcap is None else float(inputs.softcap),
            "SOFTCAP": inputs.softcap is not None,
            "ACC": tl.float64 if inputs.accumulator == torch.float64 else tl.float32,
        }

    def statistics(self, tile: Tensor, target: Tensor, column: int, state: Tensor, found: tuple[Tensor, ...]) -> None:
        """Add a contiguous tile of raw logits to `state` [4, rows]; the last tile writes `found` instead."""
        rows, columns = tile.shape
        config = tile_config(columns)
        launch(
            statistics_kernel, (rows,), config, tile.device,
            tile=tile, target=target, state=state, logprob=found[0], entropy=found[1], lse=found[2], columns=columns,
            column=column, rows=rows, FIRST=column == 0, LAST=column + columns == self._vocabulary,
            BLOCK=config.block_dim, **self._options,
        )  # fmt: skip

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
        """The loss's derivative by a contiguous tile of raw logits, [rows, columns] of `dtype` in the tile's memory:
        row i at the start of the tile's row i. `grads` as in torch_tiles.py, contiguous.
        """
        rows, columns = tile.shape
        config = tile_config(columns)
        slope = tile.view(dtype)[:, :columns]
        launch(
            gradient_kernel, (rows,), config, tile.device,
            tile=tile, slope=slope, target=target, entropy=entropy, lse=lse, d_logprob=grads[0], d_entropy=grads[1],
            d_lse=grads[2], columns=columns, slope_stride=slope.stride(0), column=column, BLOCK=config.block_dim,
            **self._options,
        )  # fmt: skip
        return slope


def forward(inputs: Inputs, rows: Tensor | None) -> Outputs:
    """(logprob, entropy, lse), each of target's shape: a product and a launch per tile."""
    return run_forward(inputs, rows, TritonTiles)


def backward(
    grads: OutputGrads, inputs: Inputs, rows: Tensor | None, entropy: Tensor, lse: Tensor, needs: Needs
) -> Grads:
    """Gradients of hidden and weight (None if not needed): up to three products and a launch per tile."""
    return run_backward(grads, inputs, rows, entropy, lse, needs, TritonTiles)
