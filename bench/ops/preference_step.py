"""Cases of `preference_step`: against the loss composed from torch's ops, with autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.ensemble_reward import STD_FLOOR
from ...kernels.preference_step import preference_step, reference
from ...kernels.preference_step.contract import Inputs
from ..case import DTYPES, Case, Check, Work, compare, compiled_variants, generator, num_sets

HEADS, ALPHA = 5, 4.0
ROWS = {"smoke": ((64, 256),), "small": ((8192, 4096),), "full": ((65536, 4096),)}  # [2P, D]
_OUTPUTS = ("loss", "dweight", "dbias")


def bradley_terry(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Eq. 3 of BRME on the mean of heads."""
    reward = (F.linear(features, weight[:HEADS]).float() + bias[:HEADS]).mean(dim=1)
    chosen, rejected = reward.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def brme(features: Tensor, weight: Tensor, bias: Tensor, head_id: Tensor, p_hat: Tensor) -> Tensor:
    """Eq. 8 of BRME in expectation; each pair trains one head."""
    mean, raw = (F.linear(features, weight).float() + bias).chunk(2, dim=1)
    own = head_id.repeat(2)[:, None]
    std = F.softplus(raw.gather(1, own)) + STD_FLOOR
    half = ALPHA * (p_hat - 0.5)
    residual = mean.gather(1, own)[:, 0] - torch.cat([half, -half])
    return (residual.square() + std[:, 0].square()).sum() / len(head_id)


_LOSSES: dict[str, Callable[..., Tensor]] = {"bt": bradley_terry, "brme": brme}


def fused(features: Tensor, weight: Tensor, bias: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    head_id, p_hat = targets or (None, None)
    out = preference_step(
        features, weight, bias, loss="brme" if targets else "bt", head_id=head_id, p_hat=p_hat, alpha=ALPHA
    )
    return out.loss, out.dweight, out.dbias


def _by_autograd(loss: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(*tensors)
    weight, bias = torch.autograd.grad(value, tensors[1:3])
    return value.detach(), weight, bias


def _tensors(rows: int, dim: int, dtype: str, loss: str, g: torch.Generator) -> tuple[Tensor, ...]:
    new = partial(torch.randn, generator=g, device=g.device)
    weight = (new(2 * HEADS, dim) / dim**0.5).to(DTYPES[dtype]).requires_grad_()
    features, bias = new(rows, dim, dtype=DTYPES[dtype]), new(2 * HEADS).requires_grad_()
    if loss == "bt":
        return features, weight, bias
    head_id = torch.randint(HEADS, (rows // 2,), generator=g, device=g.device)
    return features, weight, bias, head_id, torch.rand(rows // 2, generator=g, device=g.device)


def _make(rows: int, dim: int, dtype: str, loss: str, device: torch.device) -> Work:
    sets: list[tuple[Any, ...]] = [
        _tensors(rows, dim, dtype, loss, generator(device, seed)) for seed in range(num_sets(device))
    ]
    losses = {"eager": _LOSSES[loss], **compiled_variants(_LOSSES[loss], device)}
    variants: dict[str, Any] = {
        "ours": fused,
        **{name: partial(_by_autograd, function) for name, function in losses.items()},
    }
    return Work(sets, variants, lambda: _check(sets[0], loss), grad=True)


def _check(tensors: tuple[Any, ...], loss: str) -> Check:
    features, weight, bias, *targets = tensors
    x, w, b = (t.detach().double() for t in (features, weight, bias))
    head_id, p_hat = targets or (None, None)
    p_hat = None if p_hat is None else p_hat.double()
    inputs = Inputs(
        features=x,
        weight=w,
        bias=b,
        rows=None,
        head_id=head_id,
        p_hat=p_hat,
        margin=None,
        seed=None,
        loss=loss,
        alpha=ALPHA,
        bsr=0.0,
        centre=0.0,
        std_floor=STD_FLOOR,
    )
    exact = reference.step(inputs)
    ours, eager = fused(*tensors), _by_autograd(_LOSSES[loss], *tensors)
    named = (dict(zip(_OUTPUTS, outputs[:3], strict=True)) for outputs in (ours, eager, exact))
    return compare(*named)


def step_bytes(rows: int, dim: int, dtype: str, loss: str) -> int:
    """Read: features, weight, bias, each pair's head and probability. Written: both gradients and three numbers."""
    storage = DTYPES[dtype].itemsize
    parameters = storage * 2 * HEADS * dim + 4 * 2 * HEADS
    return storage * rows * dim + 2 * parameters + (12 * (rows // 2) if loss == "brme" else 0) + 3 * 4


def cases() -> Iterator[Case]:
    for size, shapes in ROWS.items():
        for dtype in DTYPES:
            for rows, dim in shapes:
                for loss, columns in (("bt", HEADS), ("brme", 2)):  # columns of a row's product and gradient
                    flops = 4 * rows * dim * columns
                    make = partial(_make, rows, dim, dtype, loss)
                    moved = step_bytes(rows, dim, dtype, loss)
                    yield Case("preference_step", loss, f"{rows} x {dim}", dtype, size, moved, flops, make)
