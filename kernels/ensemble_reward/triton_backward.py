"""Triton kernels of the backward: recompute to the product's gradient, both outer products from a second read."""
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_math import (
    aggregate_gradient,
    column_rows,
    folded_weight,
    noise,
    positions,
    product,
    split_heads,
)


@triton.jit(do_not_specialize=["num_rows", "pick"])
def product_gradient_kernel(
    hidden, row_stride, weight, bias, rows, norm_weight, seed, shift, scale, std_ref,
    grad_reward, reward_stride, grad_mean, mean_row, mean_column, grad_std, std_row, std_column, grad_sum,
    scaled, along, bias_partials,
    num_rows, d, pick, coefficient: tl.float64, norm_eps: tl.float64, std_floor: tl.float64,
    K: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr, FROM_SAMPLE: tl.constexpr,
    M: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scaled [N, BN] = dL/dproduct * rstd; along [N] = rstd^2 / D * sum_n dL/dproduct_n product_n; bias_partials
    [programs, 2K] = the rows' dL/dproduct summed. All ACC. `grad_reward` comes already centred.
    """
    KP: tl.constexpr = BN // 2
    program = tl.program_id(0)
    heads = tl.arange(0, KP)
    n, row, inside = positions(program, num_rows, rows, M)
    z, rstd = product(hidden, row_stride, weight, norm_weight, norm_eps, row, inside, d,
                      K, M, BD, BN, ACC, HALVES, PRECISION, UPCAST)  # fmt: skip
    mean, std, raw = split_heads(z, bias, shift, scale, std_floor, K, M, BN, ACC)
    real = inside[:, None] & (heads < K)[None, :]

    d_mean = tl.zeros_like(mean)
    d_std = tl.zeros_like(mean)
    if grad_reward is not None or grad_sum is not None:
        g = tl.zeros((M,), ACC)
        if grad_reward is not None:
            g += tl.load(grad_reward + n * reward_stride, mask=inside, other=0.0).to(ACC)
        if grad_sum is not None:
            g += tl.load(grad_sum).to(ACC)
        if FROM_SAMPLE:
            a = noise(seed, n, heads, K, ACC)
            to_mean, to_value = aggregate_gradient(std, mean + std * a, std_ref, coefficient, pick, heads,
                                                   K, KP, KIND, NOMINAL, ACC)  # fmt: skip
            d_std = to_value * a * g[:, None]
        else:
            to_mean, to_value = aggregate_gradient(std, mean, std_ref, coefficient, pick, heads,
                                                   K, KP, KIND, NOMINAL, ACC)  # fmt: skip
        d_mean = (to_mean + to_value) * g[:, None]
    if grad_mean is not None:
        at = n[:, None] * mean_row + heads[None, :] * mean_column
        d_mean += tl.load(grad_mean + at, mask=real, other=0.0).to(ACC)
    if grad_std is not None:
        at = n[:, None] * std_row + heads[None, :] * std_column
        d_std += tl.load(grad_std + at, mask=real, other=0.0).to(ACC)
    if scale is not None:
        by = tl.load(scale + heads, mask=heads < K, other=1.0).to(ACC)[None, :]
        d_mean, d_std = d_mean / by, d_std / by
    d_raw = d_std / (1.0 + tl.exp(-raw))
    # padding must be exact zeros: it takes part in the products that follow
    d_z = tl.reshape(tl.join(tl.where(real, d_mean, 0.0), tl.where(real, d_raw, 0.0)), (M, BN))

    column = tl.arange(0, BN)
    tl.store(scaled + n[:, None] * BN + column[None, :], d_z * rstd[:, None], mask=inside[:, None])
    if along is not None:
        share = tl.sum(d_z * z, axis=1) * rstd * rstd / d
        tl.store(along + n, share, mask=inside)
    if bias_partials is not None:
        source, is_real = column_rows(K, BN)
        tl.store(bias_partials + program.to(tl.int64) * (2 * K) + source, tl.sum(d_z, axis=0), mask=is_real)


@triton.jit(do_not_specialize=["num_rows", "blocks_each"])
def outer_kernel(
    hidden, row_stride, weight, rows, norm_weight, scaled, along, grad_hidden, weight_partials,
    num_rows, d, blocks_each,
    K: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (c, s): columns c BD .. of D and the s-th share of the rows, `blocks_each` blocks of M.

    grad_hidden [N, D] (in place n, any float dtype) = scaled @ W' - x along; weight_partials [shares, 2K, D] ACC =
    scaled^T @ x over the share's rows, in ascending order.
    """
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    share = tl.program_id(1)
    column = tl.arange(0, BN)
    acc = tl.zeros((BN, BD), ACC)
    if grad_hidden is not None:
        w = tl.trans(folded_weight(weight, norm_weight, columns, d, K, BN, ACC))
    for block in range(share * blocks_each, (share + 1) * blocks_each):
        n, row, inside = positions(block, num_rows, rows, M)
        c = tl.load(scaled + n[:, None] * BN + column[None, :], mask=inside[:, None], other=0.0)
        here = inside[:, None] & (columns < d)[None, :]
        if weight_partials is not None or along is not None:
            at = hidden + (row * row_stride)[:, None] + columns[None, :]
            x = tl.load(at, mask=here, other=0.0).to(ACC)
        if grad_hidden is not None:
            dx = tl.dot(c, w, input_precision=PRECISION, out_dtype=ACC)
            if along is not None:
                dx -= x * tl.load(along + n, mask=inside, other=0.0)[:, None]
            tl.store(grad_hidden + n[:, None] * d + columns[None, :], dx.to(grad_hidden.dtype.element_ty), mask=here)
        if weight_partials is not None:
            acc = tl.dot(tl.trans(c), x, acc, input_precision=PRECISION, out_dtype=ACC)
    if weight_partials is not None:
        source, real = column_rows(K, BN)
        at = (share.to(tl.int64) * (2 * K) + source) * d
        tl.store(weight_partials + at[:, None] + columns[None, :], acc, mask=real[:, None] & (columns < d)[None, :])


@triton.jit(do_not_specialize=["shares"])
def weight_gradient_kernel(
    weight, norm_weight, weight_partials, grad_weight, grad_norm_weight, shares, d,
    K: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The partials of the folded weight, added in ascending order, to dW = dW' g and dg = sum_n dW'_n W_n."""
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    source, real = column_rows(K, BN)
    at = (source.to(tl.int64) * d)[:, None] + columns[None, :]
    here = real[:, None] & (columns < d)[None, :]
    folded = tl.zeros((BN, BD), ACC)
    for share in range(shares):
        offset = tl.cast(share, tl.int64) * (2 * K) * d
        folded += tl.load(weight_partials + offset + at, mask=here, other=0.0)
    if grad_norm_weight is not None:
        w = tl.load(weight + at, mask=here, other=0.0).to(ACC)
        gain = tl.sum(folded * w, axis=0)
        tl.store(grad_norm_weight + columns, gain.to(grad_norm_weight.dtype.element_ty), mask=columns < d)
    if grad_weight is not None:
        if norm_weight is not None:
            folded *= tl.load(norm_weight + columns, mask=columns < d, other=0.0).to(ACC)[None, :]
        tl.store(grad_weight + at, folded.to(grad_weight.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["num_rows"])
def scatter_kernel(compact, sorted_rows, order, grad_hidden, num_rows, d, BD: tl.constexpr, ACC: tl.constexpr):
    """Adds compact [N, D] into grad_hidden [R, D] by row: the program at the first of a run of equal rows adds the run.

    `rows` may repeat; one program adds all of a row's shares in a fixed order and rounds once.
    """
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.load(sorted_rows + place)
    if row == tl.load(sorted_rows + place - 1, mask=place > 0, other=-1):
        return
    acc = tl.zeros((BD,), ACC)
    mine = place < num_rows
    while mine:
        at = tl.load(order + place) * d
        acc += tl.load(compact + at + columns, mask=columns < d, other=0.0)
        place += 1
        mine = tl.load(sorted_rows + place, mask=place < num_rows, other=-1) == row
    tl.store(grad_hidden + row * d + columns, acc.to(grad_hidden.dtype.element_ty), mask=columns < d)
