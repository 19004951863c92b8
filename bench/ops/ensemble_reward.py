"""Cases of `ensemble_reward`: against the same heads composed from torch's ops, with transformers' RMSNorm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.ensemble_reward import STD_FLOOR, Aggregation, aggregate, ensemble_reward, reference
from ...kernels.ensemble_reward.contract import Inputs
from ..case import DTYPES, Case, Check, Work, compare, compiled_variants, generator, judge, num_sets, relative_error

HEADS, LAM, EPS = 5, 0.4, 1e-6
SPEC = f"tradeoff:{LAM}"
ROWS = {  # [N, D]
    "smoke": ((64, 256),),
    "small": ((8192, 4096), (65536, 1024)),
    "full": ((65536, 4096),),
}
LAST_TOKENS = {"smoke": (4, 16, 256), "small": (64, 128, 4096), "full": (256, 1024, 4096)}  # [B, T, D]
_CHUNK = 4096  # rows of the fp64 reference at a time


def composed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(reward, mean, std, reward_sum) in plain torch, as a trainer would write it, with the same roundings."""
    x = hidden if rows is None else hidden[rows]
    if norm_weight is not None:
        x32 = x.float()
        x = norm_weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
    mean, raw = (F.linear(x, weight).float() + bias).chunk(2, dim=-1)
    std = F.softplus(raw) + STD_FLOOR
    nominal = mean.gather(1, std.argmin(dim=1, keepdim=True))[:, 0]
    reward = LAM * nominal + (1.0 - LAM) * mean.amin(dim=1)
    return reward, mean, std, reward.sum()


def fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ensemble_reward(hidden, weight, bias, norm_weight=norm_weight, rows=rows, norm_eps=EPS, aggregation=SPEC)[:4]


def _gradients(score: Any, tensors: tuple[Any, ...], upstream: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward, from gradients of the means and stds (as with BRME's loss) to every parameter."""
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    _, mean, std, _ = score(*tensors)
    return torch.autograd.grad((mean, std), leaves, upstream)


def _make(stored: int, dim: int, dtype: str, norm: bool, gather: int, grad: bool, device: torch.device) -> Work:
    sets = [_tensors(stored, dim, dtype, norm, gather, generator(device, seed)) for seed in range(num_sets(device))]
    if grad:
        for tensors in sets:
            for t in tensors[:4]:
                if t is not None:
                    t.requires_grad_()
        g = generator(device, 99)
        upstream = (
            torch.randn(stored, HEADS, device=device, generator=g),
            torch.randn(stored, HEADS, device=device, generator=g),
        )
        forward = {"ours": fused, "eager": composed, **compiled_variants(composed, device)}
        variants: dict[str, Any] = {name: _differentiated(score, upstream) for name, score in forward.items()}
        return Work(sets, variants, lambda: _check_gradients(sets[0], upstream), grad=True)
    variants = {"ours": fused, "eager": composed, **compiled_variants(composed, device)}
    if not gather:
        variants["F.linear"] = lambda hidden, weight, *_: F.linear(hidden, weight)
    return Work(sets, variants, lambda: _check_forward(sets[0]))


def _differentiated(score: Any, upstream: tuple[Tensor, Tensor]) -> Any:
    return lambda *tensors: _gradients(score, tensors, upstream)


def _tensors(
    stored: int, dim: int, dtype: str, norm: bool, gather: int, g: torch.Generator
) -> tuple[Tensor | None, ...]:
    new = partial(torch.randn, generator=g, device=g.device)
    hidden = new(stored, dim, dtype=DTYPES[dtype])
    weight = (new(2 * HEADS, dim) / dim**0.5).to(DTYPES[dtype])
    norm_weight = (1 + 0.1 * new(dim)).to(DTYPES[dtype]) if norm else None
    rows = torch.arange(1, gather + 1, device=g.device) * (stored // gather) - 1 if gather else None
    return hidden, weight, new(2 * HEADS), norm_weight, rows


def _exact(tensors: tuple[Any, ...], rows: slice) -> tuple[Tensor, Tensor]:
    """Means and stds of some of the scored rows by the fp64 reference."""
    hidden, weight, bias, norm_weight, index = tensors
    picked = hidden[rows] if index is None else hidden[index[rows]]
    wide: tuple[Any, ...] = tuple(None if t is None else t.double() for t in (picked, weight, bias, norm_weight))
    inputs = Inputs(wide[0], wide[1], wide[2], None, wide[3], None, None, None, None, None, 0, EPS, STD_FLOOR, SPEC)
    _, mean, std, _, _, _ = reference.forward(inputs)
    return mean, std


@torch.no_grad()
def _check_forward(tensors: tuple[Any, ...]) -> Check:
    """Check means and stds against fp64, and the reward against the fp64 aggregation of our own means and stds, because
    it jumps when another head has the least std.
    """
    parts = [_exact(tensors, slice(i, i + _CHUNK)) for i in range(0, _scored(tensors), _CHUNK)]
    exact_mean, exact_std = (torch.cat(part) for part in zip(*parts, strict=True))
    spec = Aggregation.parse(SPEC)

    def errors(outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
        reward, mean, std, total = outputs
        own = aggregate(mean.double(), std.double(), mean.double(), spec)
        return {
            "mean": relative_error(mean, exact_mean),
            "std": relative_error(std, exact_std),
            "reward": relative_error(reward, own),
            "reward_sum": float((total - own.sum()).abs() / own.abs().sum()),
        }

    ours, eager = errors(fused(*tensors)), errors(composed(*tensors))
    return judge({name: (ours[name], eager[name]) for name in ours})


def _scored(tensors: tuple[Any, ...]) -> int:
    hidden, rows = tensors[0], tensors[4]
    return len(hidden if rows is None else rows)


def _check_gradients(tensors: tuple[Any, ...], upstream: tuple[Tensor, Tensor]) -> Check:
    names = [n for n, t in zip(("hidden", "weight", "bias", "norm_weight"), tensors, strict=False) if t is not None]
    ours, eager = (dict(zip(names, _gradients(score, tensors, upstream), strict=True)) for score in (fused, composed))
    parameters = [None if t is None else t.detach().double().requires_grad_() for t in tensors[1:4]]
    leaves = [t for t in parameters if t is not None]
    dhidden = []
    for i in range(0, len(tensors[0]), _CHUNK):
        part = slice(i, i + _CHUNK)
        x = tensors[0][part].detach().double().requires_grad_()
        torch.autograd.backward(_exact((x, *parameters, None), slice(None)), [g[part].double() for g in upstream])
        dhidden.append(x.grad)
    return compare(ours, eager, dict(zip(names, [torch.cat(dhidden), *(t.grad for t in leaves)], strict=True)))


def forward_bytes(rows: int, dim: int, dtype: str, norm: bool, gather: bool = False) -> int:
    """Read: features, weight, bias, norm weight, row indices. Written: reward, means, stds, reward sum."""
    storage = DTYPES[dtype].itemsize
    read = storage * dim * (rows + 2 * HEADS + norm) + 4 * 2 * HEADS + 8 * rows * gather
    return read + 4 * (rows * (1 + 2 * HEADS) + 1)


def backward_bytes(rows: int, dim: int, dtype: str, norm: bool) -> int:
    """Read: the features, the parameters, the upstream gradients and the forward's saved tensor (contract.py). Written:
    the gradients of each parameter and of the features.
    """
    storage = DTYPES[dtype].itemsize
    parameters = storage * dim * (2 * HEADS + norm) + 4 * 2 * HEADS
    upstream, saved = 4 * rows * 2 * HEADS, 4 * rows * (2 * HEADS + 1)
    return 2 * (storage * dim * rows + parameters) + upstream + saved


def _case(mode: str, rows: int, dim: int, dtype: str, size: str, norm: bool, grad: bool = False) -> Case:
    moved = forward_bytes(rows, dim, dtype, norm) + (4 * rows * (2 * HEADS + 1) if grad else 0)
    flops = 2 * rows * dim * 2 * HEADS
    make = partial(_make, rows, dim, dtype, norm, 0, grad)
    if grad:
        moved, flops = moved + backward_bytes(rows, dim, dtype, norm), 3 * flops
    return Case("ensemble_reward", mode, f"{rows} x {dim}", dtype, size, moved, flops, make)


def cases() -> Iterator[Case]:
    for size, shapes in ROWS.items():
        for dtype in DTYPES:
            for rows, dim in shapes:
                yield _case("forward, norm", rows, dim, dtype, size, True)
                yield _case("forward", rows, dim, dtype, size, False)
                yield _case("forward + backward, norm", rows, dim, dtype, size, True, grad=True)
            if size != "full":
                yield _case("few rows, norm", 16, shapes[0][1], dtype, size, True)
            batch, length, dim = LAST_TOKENS[size]
            yield Case(
                "ensemble_reward",
                "last tokens, norm",
                f"{batch} x {length} x {dim}",
                dtype,
                size,
                forward_bytes(batch, dim, dtype, True, gather=True),
                2 * batch * dim * 2 * HEADS,
                partial(_make, batch * length, dim, dtype, True, batch, False),
            )
