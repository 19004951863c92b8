"""Launch `advantages` on CUDA, compiled for ROCm: one kernel for rewards, advantages and statistics, one for whitening.

The first has one program per sequence; the last program to finish writes the statistics. Whitening is a second launch
because it needs the statistics of all sequences, and one program that rewrites B T numbers would take longer than a
launch. CPU tensors work only under Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arrivals import architecture, arrivals, stores_done
from ..launch import launch
from .configs import SWEEP, config
from .contract import VARIANCE_EPS, Inputs, Outputs
from .triton_kernels import advantage_kernel, whiten_kernel


def _rows(name: str, stride: str, tensor: Tensor | None) -> dict[str, Any]:
    """A tensor with a contiguous last dimension and its row stride, under the names of the kernel's arguments."""
    if tensor is None:
        return {name: None, stride: 0}
    if tensor.dim() == 2 and tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    return {name: tensor.view(torch.int8) if tensor.dtype == torch.bool else tensor, stride: tensor.stride(0)}


def forward(inputs: Inputs, arch: str | None = None) -> Outputs:
    """(advantage, returns, reward [B, T], dropped [B], stats [6]). `arch`: to compile for, if not the device's own."""
    (batch, length), device, dtype = inputs.mask.shape, inputs.mask.device, inputs.output_dtype
    advantage, returns, reward = (torch.empty(batch, length, dtype=dtype, device=device) for _ in range(3))
    dropped = torch.empty(batch, dtype=torch.bool, device=device)
    stats = torch.empty(6, dtype=dtype, device=device)
    tile = config(length, dtype)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    decay = inputs.gamma * inputs.effective_lam
    mask = _rows("mask", "mask_stride", inputs.mask)
    launch(
        advantage_kernel, (batch,), tile, device,
        **_rows("score", "score_stride", inputs.score), **_rows("logprob", "logprob_stride", inputs.logprob),
        **_rows("ref_logprob", "ref_stride", inputs.ref_logprob), **_rows("value", "value_stride", inputs.value),
        **mask, advantage=advantage, returns=returns, reward=reward, dropped=dropped.view(torch.int8), stats=stats,
        partials=torch.empty(5, batch, dtype=dtype, device=device), counter=arrivals(device),
        batch=batch, length=length, decay=float(decay), value_share=float(inputs.gamma - decay),
        hole=1.0 if inputs.holes == "skip" else float(decay), kl_coef=float(inputs.kl_coef),
        kl_clip=float(inputs.kl_clip), ESTIMATOR=inputs.kl_estimator, PER_TOKEN=inputs.score.dim() == 2,
        AFTER=inputs.score_at == "after", DDOF=0 if inputs.whiten == "population" else 1,
        BLOCK=tile.block_dim, SWEEP=SWEEP, ACC=acc,
        STORES_DONE=stores_done(architecture(device) if arch is None else arch),
    )  # fmt: skip
    if inputs.whiten != "none":
        launch(
            whiten_kernel, (batch, triton.cdiv(length, tile.block_dim)), tile, device,
            advantage=advantage, **mask, dropped=dropped.view(torch.int8), stats=stats, length=length, eps=VARIANCE_EPS,
            WHITEN=inputs.whiten, BLOCK=tile.block_dim, ACC=acc,
        )  # fmt: skip
    return advantage, returns, reward, dropped, stats
