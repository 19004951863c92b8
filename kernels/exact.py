"""Matrix products for the references, in fp64: no setting around a call reaches them.

torch.autocast would round fp32 operands to 16 bits, and torch.set_float32_matmul_precision to TF32 or bf16. Autocast
passes fp64 by, and the precision concerns fp32 alone, so nothing global is changed and restored, which other threads
would see. A block of rows at a time is copied to fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # copied at once: 32 MiB in fp64 at 4096 columns


def times(a: Tensor, b: Tensor) -> Tensor:
    """a [N, M] @ b [M, L] -> [N, L], summed in fp64 and rounded once to a's dtype."""
    wide = b.double()
    return torch.cat([(rows.double() @ wide).to(a.dtype) for rows in a.split(ROWS)])


def transposed_times(a: Tensor, b: Tensor) -> Tensor:
    """a [N, M].T @ b [N, L] -> [M, L], summed in fp64 and rounded once to a's dtype."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(ROWS), b.split(ROWS), strict=True):
        total = total + left.double().T @ right.double()
    return total.to(a.dtype)
