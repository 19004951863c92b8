"""`ensemble_reward` in plain torch: the oracle of the other executions, and the execution on a CPU without `_C.so`.

It follows the formulas in README.md line by line and is not meant to be fast. Arithmetic is in fp32, or fp64 when
`hidden` is fp64; matrix products sum in fp64 always (../exact.py). The backward is written out, because a registered op
runs below autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exact import times, transposed_times
from .contract import Grads, Inputs, Needs, OutputGrads, Outputs
from .spec import Aggregation
from .trust import Measured, features_gradient, measure, price, price_gradient

PHILOX_ROUNDS = (
    7  # Crush-resistant (Salmon et al. 2011, table 2) and what flash-attention uses; 10 would cost 40 % more
)
_MASK = 0xFFFFFFFF


def philox_4x32(seed: Tensor, counter: Tensor, rounds: int = PHILOX_ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 (Salmon et al. 2011): key = the seed's two halves, counter = (low, high, 0, 0).

    seed [1] int64, counter [...] int64 -> four words in [0, 2^32), each [...] int64. The same bits as
    `triton.language.randint4x(seed, counter, rounds)` and as the C++ kernels.
    """
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def philox_normal(seed: Tensor, num_rows: int, num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The op's noise a ~ N(0, 1), [num_rows, num_heads]: Box-Muller on words 0 and 1 at counter row * num_heads + head.

    The uniforms are (word >> 9) * 2^-23 + 2^-24: 24 bits, exact in fp32, never 0 or 1; |a| <= 5.77.
    """
    counter = torch.arange(num_rows * num_heads, dtype=torch.int64, device=seed.device).view(num_rows, num_heads)
    w0, w1, _, _ = philox_4x32(seed, counter)
    u0, u1 = (((w >> 9).to(dtype) * 2.0**-23 + 2.0**-24) for w in (w0, w1))
    return torch.sqrt(-2.0 * torch.log(u0)) * torch.cos(2.0 * math.pi * u1)


class Heads(NamedTuple):
    """The values between the features and the reward, for N rows; the backward's formulas use them."""

    x: Tensor  # [N, D] gathered rows
    rstd: Tensor | None  # [N, 1] of the RMSNorm; None without one
    folded: Tensor  # [2K, D] norm_weight * weight
    product: Tensor  # [N, 2K] before the bias
    raw_std: Tensor  # [N, K]
    mean: Tensor  # [N, K] calibrated
    std: Tensor  # [N, K] calibrated
    noise: Tensor | None  # [N, K]
    values: Tensor  # [N, K] the aggregation's input: samples or means
    measured: Measured | None  # the distance's parts; None without a trust region


def heads(inputs: Inputs) -> Heads:
    """Gather, norm, both products, softplus, calibration and sampling."""
    dtype, k = inputs.output_dtype, inputs.num_heads
    x = inputs.hidden if inputs.rows is None else inputs.hidden.index_select(0, inputs.rows)
    x = x.to(dtype)
    folded = inputs.weight.to(dtype)
    rstd = None
    if inputs.norm_weight is not None:
        folded = folded * inputs.norm_weight.to(dtype)
        rstd = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + inputs.norm_eps)
    product = times(x, folded.T)
    if rstd is not None:
        product = product * rstd
    z = product if inputs.bias is None else product + inputs.bias.to(dtype)
    mean, raw_std = z[:, :k], z[:, k:]
    std = F.softplus(raw_std) + inputs.std_floor
    if inputs.shift is not None:
        mean = mean - inputs.shift.to(dtype)
    if inputs.scale is not None:
        mean, std = mean / inputs.scale.to(dtype), std / inputs.scale.to(dtype)
    noise = None if inputs.seed is None else philox_normal(inputs.seed, inputs.num_rows, k, dtype)
    values = mean if noise is None or inputs.spec.source == "mean" else mean + std * noise
    measured = None
    if inputs.trust is not None:
        measured = measure(x if rstd is None else x * inputs.norm_weight.to(dtype) * rstd, inputs.trust)  # type: ignore[union-attr]
    return Heads(x, rstd, folded, product, raw_std, mean, std, noise, values, measured)


def nominal_index(std: Tensor, spec: Aggregation, std_ref: Tensor | None = None) -> Tensor:
    """[N] int64: the head whose mean is the nominal reward (not for nominal='mean'). BRME 5.1: the least std."""
    if spec.nominal.startswith("head:"):
        return torch.full(std.shape[:1], spec.nominal_head, dtype=torch.int64, device=std.device)
    if spec.nominal == "relative_std":
        assert std_ref is not None
        std = std / std_ref.to(std.dtype)
    return std.argmin(dim=1)


def nominal_reward(mean: Tensor, std: Tensor, spec: Aggregation, std_ref: Tensor | None = None) -> Tensor:
    """[N]: the nominal reward of BRME 5.1, or as `spec.nominal` redefines it. mean, std [N, K]."""
    if spec.nominal == "mean":
        return mean.mean(dim=1)
    return mean.gather(1, nominal_index(std, spec, std_ref)[:, None])[:, 0]


def batch_worst(values: Tensor) -> Tensor:
    """[] int64 k* = argmin_k mean_n values_nk, BRME eq. 6: the worst head of the whole batch, the lowest on a tie."""
    return values.double().mean(dim=0).argmin()


def aggregate(
    mean: Tensor,
    std: Tensor,
    values: Tensor,
    spec: Aggregation,
    std_ref: Tensor | None = None,
    distance: Tensor | None = None,
    unit: Tensor | None = None,
) -> Tensor:
    """[N, K] heads -> [N] rewards before centring. `values` [N, K]: the samples, or the means. A spec with a price
    needs `distance` [N] and the trust region's `unit` [1]; else a ValueError.
    """
    reward = _aggregate_heads(mean, std, values, spec, std_ref)
    if spec.trust is None:
        return reward
    if distance is None or unit is None:
        raise ValueError(f"aggregate: distance: expected the distances [N] and unit for {str(spec)!r}, got None")
    return reward - price(distance, unit, spec)


def _aggregate_heads(mean: Tensor, std: Tensor, values: Tensor, spec: Aggregation, std_ref: Tensor | None) -> Tensor:
    if spec.kind in ("tradeoff", "nominal"):
        nominal = nominal_reward(mean, std, spec, std_ref)
        if spec.kind == "nominal":
            return nominal
        worst = values[:, batch_worst(values)] if spec.of_batch else values.min(dim=1).values
        return spec.coefficient * nominal + (1.0 - spec.coefficient) * worst
    if spec.kind == "batch_worst":
        return values[:, batch_worst(values)]
    if spec.kind == "softmin":
        b = spec.coefficient
        return -b * (torch.logsumexp(-values / b, dim=1) - math.log(values.shape[1]))
    if spec.kind in ("lcb", "uwo"):
        variance = values.var(dim=1, correction=0)
        spread = variance.sqrt() if spec.kind == "lcb" else variance
        return values.mean(dim=1) - spec.coefficient * spread
    weight = _order_weights(values, spec)
    # leave out heads of weight 0, because 0 * inf is NaN; but a NaN head makes the row NaN
    taken = (weight != 0) | values.isnan()
    return torch.where(taken, values * weight, torch.zeros_like(values)).sum(dim=1)


def _order_weights(values: Tensor, spec: Aggregation) -> Tensor:
    """[N, K] weights of the aggregations that combine the heads by rank, or by index, with fixed weights."""
    k = values.shape[1]
    by_rank = torch.zeros(k, dtype=values.dtype, device=values.device)
    if spec.kind == "mean":
        by_rank += 1.0 / k
    elif spec.kind == "median":
        by_rank[(k - 1) // 2] += 0.5
        by_rank[k // 2] += 0.5
    elif spec.kind == "cvar":
        tail = cvar_tail(spec.coefficient, k)
        by_rank[:tail] = 1.0 / tail
    else:
        by_rank[{"min": 0, "max": k - 1, "head": int(spec.coefficient)}[spec.kind]] = 1.0
    if spec.kind in ("mean", "head"):
        return by_rank.expand_as(values)
    # a stable sort puts the lowest index first on a tie, which is wrong for max: there the lowest index must win
    if spec.kind == "max":
        return F.one_hot(values.argmax(dim=1), k).to(values.dtype)
    order = values.sort(dim=1, stable=True).indices
    return torch.zeros_like(values).scatter(1, order, by_rank.expand_as(values))


def cvar_tail(q: float, num_heads: int) -> int:
    """How many of the lowest heads `cvar:q` averages: ceil(q * K), with a tolerance for the product's rounding."""
    return max(1, math.ceil(q * num_heads - 1e-9))


def aggregate_gradient(h: Heads, spec: Aggregation, std_ref: Tensor | None) -> tuple[Tensor, Tensor]:
    """d reward / d mean (only through the nominal head) and d reward / d values, each [N, K]."""
    values, k = h.values, h.values.shape[1]
    to_mean = torch.zeros_like(values)
    if spec.kind in ("tradeoff", "nominal"):
        lam = spec.coefficient if spec.kind == "tradeoff" else 1.0
        if spec.nominal == "mean":
            to_mean += lam / k
        else:
            to_mean.scatter_(1, nominal_index(h.std, spec, std_ref)[:, None], lam)
        return to_mean, _worst_weights(values, spec) * (1.0 - lam)
    if spec.kind == "batch_worst":
        return to_mean, _worst_weights(values, spec)
    if spec.kind == "softmin":
        return to_mean, torch.softmax(-values / spec.coefficient, dim=1)
    if spec.kind in ("lcb", "uwo"):
        gap = values - values.mean(dim=1, keepdim=True)
        if spec.kind == "uwo":
            return to_mean, 1.0 / k - 2.0 * spec.coefficient * gap / k
        spread = gap.square().mean(dim=1, keepdim=True).sqrt()
        # the std has a kink where all heads agree; the subgradient 0 leaves them equal
        slope = torch.where(spread == 0, torch.zeros_like(gap), gap / (k * spread))
        return to_mean, 1.0 / k - spec.coefficient * slope
    return to_mean, _order_weights(values, spec)


def _worst_weights(values: Tensor, spec: Aggregation) -> Tensor:
    """[N, K]: 1 at each row's worst head, or at the batch's."""
    index = batch_worst(values).expand(len(values)) if spec.of_batch else values.argmin(dim=1)
    return F.one_hot(index, values.shape[1]).to(values.dtype)


def group_mean(values: Tensor, inputs: Inputs) -> Tensor:
    """[N] -> [N]: each row's mean over its batch or group; zeros without centring."""
    centre = inputs.spec.centre
    if centre == "none" or values.numel() == 0:
        return torch.zeros_like(values)
    if centre == "batch":
        return values.mean().expand_as(values)
    if inputs.group is None:
        return values.view(-1, inputs.group_size).mean(dim=1).repeat_interleave(inputs.group_size)
    sums = add_rows(torch.zeros_like(values), inputs.group, values)
    counts = add_rows(torch.zeros_like(values), inputs.group, torch.ones_like(values))
    return (sums / counts)[inputs.group]


def add_rows(out: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Add values[n] to out[rows[n]] in place, in the same order in every run.

    index_add_ is serial on a CPU, but uses atomics on CUDA; there, index_put_ sorts the rows and adds in order.
    """
    if out.is_cuda:
        return out.index_put_((rows,), values, accumulate=True)
    return out.index_add_(0, rows, values)


def forward(inputs: Inputs, keep: bool = False) -> Outputs:
    """(reward, mean, std, reward_sum, distance, saved). Differentiable by autograd, which the tests use."""
    h = heads(inputs)
    distance = None if h.measured is None else h.measured.distance
    reward = aggregate(h.mean, h.std, h.values, inputs.spec, inputs.std_ref, distance, inputs.trust_unit)
    saved = _saved(h, inputs) if keep else h.product.new_empty(0, inputs.saved_columns)
    outputs = reward - group_mean(reward, inputs), h.mean.contiguous(), h.std.contiguous(), reward.sum()
    return *outputs, distance, saved


def _saved(h: Heads, inputs: Inputs) -> Tensor:
    """[N, S], see contract.py."""
    column = h.product[:, :1]
    parts = [h.product, torch.ones_like(column) if h.rstd is None else h.rstd]
    if h.measured is not None:
        parts += [h.measured.projections, h.measured.squared[:, None], h.measured.along[:, None]]
    if inputs.spec.of_batch:
        parts.append(batch_worst(h.values).to(column.dtype).expand_as(column))
    return torch.cat(parts, dim=1)


def backward(grads: OutputGrads, inputs: Inputs, saved: Tensor, needs: Needs) -> Grads:
    """Gradients of hidden, weight, bias and norm_weight from the gradients of the outputs.

    The oracle does not rely on `saved`: it computes everything again.
    """
    need_hidden, need_weight, need_bias, need_norm = needs
    h = heads(inputs)
    g = _total_gradient(grads, inputs)
    d_product = _product_gradient(grads, g, h, inputs)
    d_features = _features_gradient(grads, g, h, inputs)
    bias = d_product.sum(dim=0) if need_bias else None
    scaled = d_product if h.rstd is None else d_product * h.rstd
    hidden = weight = norm_weight = None
    if need_hidden:
        dx = times(scaled, h.folded)
        if d_features is not None:
            dx = dx + _to_hidden(d_features, h, inputs)
        if h.rstd is not None:
            # d rstd / dx = -rstd^3 x / D, and sum_n c_n (x . W'_n) rstd = sum_n c_n product_n: no other pass over D
            dx = dx - h.x * h.rstd.square() * (d_product * h.product).sum(dim=1, keepdim=True) / h.x.shape[1]
        hidden = dx if inputs.rows is None else add_rows(dx.new_zeros(inputs.hidden.shape), inputs.rows, dx)
        hidden = hidden.to(inputs.hidden.dtype)
    if need_weight or need_norm:
        d_folded = transposed_times(scaled, h.x)
        if inputs.norm_weight is not None:
            norm_weight = (d_folded * inputs.weight.to(d_folded.dtype)).sum(dim=0)
            if d_features is not None and h.rstd is not None:
                norm_weight = norm_weight + (d_features * h.x * h.rstd).sum(dim=0)
            norm_weight = norm_weight.to(inputs.norm_weight.dtype)
            d_folded = d_folded * inputs.norm_weight.to(d_folded.dtype)
        weight = d_folded.to(inputs.weight.dtype)
    return hidden, weight if need_weight else None, bias, norm_weight if need_norm else None


def _total_gradient(grads: OutputGrads, inputs: Inputs) -> Tensor:
    """[N]: the gradient at the aggregated rewards, through the centring and the sum."""
    g = torch.zeros(inputs.num_rows, dtype=inputs.output_dtype, device=inputs.hidden.device)
    if grads.reward is not None:
        d_reward = grads.reward.to(g.dtype)
        g = d_reward - group_mean(d_reward, inputs)
    return g if grads.reward_sum is None else g + grads.reward_sum.to(g.dtype)


def _product_gradient(grads: OutputGrads, g: Tensor, h: Heads, inputs: Inputs) -> Tensor:
    """[N, 2K]: the gradient at the matrix product (equally at the bias); g [N] is the aggregated rewards'."""
    spec, dtype = inputs.spec, inputs.output_dtype
    to_mean, to_values = aggregate_gradient(h, spec, inputs.std_ref)
    mean = (to_mean + to_values) * g[:, None]
    std = torch.zeros_like(mean)
    if h.noise is not None and spec.source == "sample":
        std = to_values * g[:, None] * h.noise
    if grads.mean is not None:
        mean = mean + grads.mean.to(dtype)
    if grads.std is not None:
        std = std + grads.std.to(dtype)
    if inputs.scale is not None:
        mean, std = mean / inputs.scale.to(dtype), std / inputs.scale.to(dtype)
    return torch.cat([mean, std * torch.sigmoid(h.raw_std)], dim=1)


def _features_gradient(grads: OutputGrads, g: Tensor, h: Heads, inputs: Inputs) -> Tensor | None:
    """[N, D]: the gradient at the features after the norm through the distance; None without a trust region."""
    region, spec = inputs.trust, inputs.spec
    if h.measured is None or region is None:
        return None
    distance = h.measured.distance
    d_distance = torch.zeros_like(distance) if grads.distance is None else grads.distance.to(distance.dtype)
    if spec.trust is not None:
        d_distance = d_distance - g * price_gradient(distance, region.unit, spec)
    return features_gradient(d_distance, h.measured, region)


def _to_hidden(d_features: Tensor, h: Heads, inputs: Inputs) -> Tensor:
    """[N, D]: a gradient at the features after the norm as one at the rows of hidden."""
    if h.rstd is None or inputs.norm_weight is None:
        return d_features
    scaled = d_features * inputs.norm_weight.to(d_features.dtype)
    shrink = h.rstd.square() * (scaled * h.x).mean(dim=1, keepdim=True)
    return h.rstd * (scaled - shrink * h.x)
