"""Matrix products of `linear_logprob`: 16-bit operands, unrounded sums, scratch allocated once per call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


class Workspace:
    """Scratch tensors by name on one device, allocated at first use and again only for a larger size."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous, uninitialised tensor; the next call with the same name may reuse its memory."""
        needed = math.prod(shape)
        piece = self._pieces.pop(name, None)
        if piece is None or piece.numel() < needed:
            piece = torch.empty(needed, dtype=dtype, device=self._device)
        self._pieces[name] = piece
        return piece[:needed].view(tuple(shape))


@cache
def _fast_bf16_on_cpu() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def operand_dtype(storage: torch.dtype, accumulator: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a product's operands. A CPU has no product of 16-bit operands with an fp32 result: bf16 operands
    take two bf16 products if the machine has the instructions; otherwise, and in fp16, operands are cast to fp32.
    """
    if device.type == "cuda" or storage == accumulator:
        return storage
    in_two = storage == torch.bfloat16 and device.type == "cpu" and _fast_bf16_on_cpu()
    return storage if in_two else accumulator


def product(a: Tensor, b: Tensor, out: Tensor, add: bool, work: Workspace) -> None:
    """out [M, N] = a [M, K] @ b [K, N], or out += with `add`; summed in fp32 or fp64, rounded once to out's dtype."""
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.dtype.itemsize < a.dtype.itemsize:
        wide = torch.mm(a, b, out=work("wide", out.shape, a.dtype))
        if add:
            out.add_(wide)
        else:
            out.copy_(wide)
    elif a.is_cuda:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        _in_two_products(a, b, out, add, work)


def _in_two_products(a: Tensor, b: Tensor, out: Tensor, add: bool, work: Workspace) -> None:
    """bf16 operands, fp32 out: add the product rounded to bf16 and its rounding error, exact to 2^-17 of the product.

    The second product gives the rounding error, because its fp32 sum starts from minus the first.
    """
    wide = work("wide", out.shape, out.dtype)  # torch's mixed-dtype addition would allocate it each time
    high = torch.mm(a, b, out=work("high", out.shape, a.dtype))
    low = torch.addmm(high, a, b, beta=-1, out=work("low", out.shape, a.dtype))
    if add:
        out.add_(wide.copy_(high))
    else:
        out.copy_(high)
    out.add_(wide.copy_(low))
