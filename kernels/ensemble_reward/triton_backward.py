"""Triton kernels of the backward: the product's gradient from the forward's saved values, then both outer products from
one read of the hidden states.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_math import (
    ANY_ADDRESS,
    aggregate_gradient,
    column_rows,
    folded_weight,
    halves,
    noise,
    operand,
    positions,
    split_heads,
    vector,
)
from .triton_trust import direction_tile, price_slope, root


@triton.jit(
    do_not_specialize=["num_rows", "size", "head_or_count"],
    do_not_specialize_on_alignment=[*ANY_ADDRESS, "grad_reward", "grad_mean", "grad_std", "grad_sum", "grad_distance"],
)
def product_gradient_kernel(
    saved, bias, seed, shift, scale, std_ref, weights, unit,
    grad_reward, reward_stride, averages, grad_mean, mean_row, mean_column, grad_std, std_row, std_column, grad_sum,
    grad_distance, distance_stride, scaled, along, bias_partials, pulls, slopes,
    num_rows, d, size, head_or_count, coefficient: tl.float64, std_floor: tl.float64,
    trust: tl.float64, trust_from: tl.float64,
    K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr,
    OF_BATCH: tl.constexpr, POWER: tl.constexpr, FROM_SAMPLE: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, RN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """scaled [N, BN] = dL/dproduct * rstd; along [N] = rstd^2 / D * sum_d f_d dL/df_d, f the features after the norm;
    bias_partials [programs, 2K] = the rows' dL/dproduct summed. All ACC. `averages` [N / size] are subtracted from each
    group's `grad_reward`; None if it is centred already or needs no centring.

    With s = dL/ddistance / distance, what the distance gives: pulls [N, RN] = s rstd weights_r (v_r . (f - mean)), None
    if R = 0, and slopes [N, 2] = s rstd^2 and s rstd; None if no gradient comes through the distance.
    """
    KP: tl.constexpr = BN // 2
    program = tl.program_id(0)
    heads = tl.arange(0, KP)
    n, _, inside = positions(program, num_rows, None, M)
    source, is_real = column_rows(K, BN)
    kept = saved + n * S
    z = tl.load(kept[:, None] + source[None, :], mask=inside[:, None] & is_real[None, :], other=0.0)
    rstd = tl.load(kept + 2 * K, mask=inside, other=1.0)
    mean, std, raw = split_heads(
        z=z, bias=bias, shift=shift, scale=scale, std_floor=std_floor, K=K, M=M, BN=BN, ACC=ACC
    )
    real = inside[:, None] & (heads < K)[None, :]

    d_mean = tl.zeros_like(mean)
    d_std = tl.zeros_like(mean)
    g = tl.zeros((M,), ACC)
    if grad_reward is not None or grad_sum is not None:
        if grad_reward is not None:
            g += tl.load(grad_reward + n * reward_stride, mask=inside, other=0.0).to(ACC)
            if averages is not None:
                g -= tl.load(averages + n // size, mask=inside, other=0.0)
        if grad_sum is not None:
            g += tl.load(grad_sum).to(ACC)
        values = mean
        if FROM_SAMPLE:
            a = noise(seed, n, heads, K, ACC)
            values = mean + std * a
        batch_head = n
        if OF_BATCH:
            batch_head = tl.load(kept + (S - 1), mask=inside, other=0.0)
        to_mean, to_value = aggregate_gradient(
            std=std, values=values, std_ref=std_ref, coefficient=coefficient, head_or_count=head_or_count,
            batch_head=batch_head, heads=heads, K=K, KP=KP, KIND=KIND, NOMINAL=NOMINAL, OF_BATCH=OF_BATCH, ACC=ACC,
        )  # fmt: skip
        if FROM_SAMPLE:
            d_std = to_value * a * g[:, None]
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
    # padding must be exact zeros, because it enters the products that follow
    d_z = tl.reshape(tl.join(tl.where(real, d_mean, 0.0), tl.where(real, d_raw, 0.0)), (M, BN))

    if slopes is not None:
        squared = tl.load(kept + (2 * K + 1 + R), mask=inside, other=0.0)
        distance = root(squared)
        d_distance = tl.zeros((M,), ACC)
        if grad_distance is not None:
            d_distance += tl.load(grad_distance + n * distance_stride, mask=inside, other=0.0).to(ACC)
        if POWER > 0:
            d_distance -= g * price_slope(distance, unit, trust, trust_from, POWER, ACC)
        by_distance = tl.where(distance == 0.0, 0.0, d_distance / tl.where(distance == 0.0, 1.0, distance))
        slope = by_distance * rstd
        tl.store(slopes + 2 * n, slope * rstd, mask=inside)
        tl.store(slopes + 2 * n + 1, slope, mask=inside)
        if pulls is not None:
            direction = tl.arange(0, RN)
            at = kept[:, None] + (2 * K + 1) + direction[None, :]
            pull = tl.load(at, mask=inside[:, None] & (direction < R)[None, :], other=0.0)
            pull *= vector(weights, direction, direction < R, 0.0, ACC)[None, :] * slope[:, None]
            tl.store(pulls + n[:, None] * RN + direction[None, :], pull, mask=inside[:, None])
    if scaled is not None:
        column = tl.arange(0, BN)
        tl.store(scaled + n[:, None] * BN + column[None, :], d_z * rstd[:, None], mask=inside[:, None])
    if along is not None:
        share = tl.sum(d_z * z, axis=1)
        if slopes is not None:  # f' P (f - mean) = D2 + mean' P (f - mean)
            share += by_distance * (squared + tl.load(kept + (2 * K + 2 + R), mask=inside, other=0.0))
        tl.store(along + n, share * rstd * rstd / d, mask=inside)
    if bias_partials is not None:
        tl.store(bias_partials + program.to(tl.int64) * (2 * K) + source, tl.sum(d_z, axis=0), mask=is_real)


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    scaled, along, pulls, slopes, sorted_rows, order, scaled_out, along_out, pulls_out, slopes_out, targets,
    num_rows, M: tl.constexpr, BN: tl.constexpr, RN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add up the contributions of repeated rows before the products, which are linear in them.

    At the first position of a run of equal rows, scaled_out [N, BN], along_out [N], pulls_out [N, RN] and slopes_out
    [N, 2] hold the sums and targets [N] the row; elsewhere they hold zeros and -1. One program adds each run in
    ascending order.
    """
    column, direction, two = tl.arange(0, BN), tl.arange(0, RN), tl.arange(0, 2)
    position, _, inside = positions(tl.program_id(0), num_rows, None, M)
    row = tl.load(sorted_rows + position, mask=inside, other=-1)
    opens = inside & (row != tl.load(sorted_rows + position - 1, mask=inside & (position > 0), other=-1))
    sums = tl.zeros((M, BN), ACC)
    along_sums = tl.zeros((M,), ACC)
    pull_sums, slope_sums = tl.zeros((M, RN), ACC), tl.zeros((M, 2), ACC)
    mine, member = opens, position
    more = tl.max(mine.to(tl.int32), axis=0) > 0
    while more:
        n = tl.load(order + member, mask=mine, other=0)
        sums += tl.load(scaled + n[:, None] * BN + column[None, :], mask=mine[:, None], other=0.0)
        if along is not None:
            along_sums += tl.load(along + n, mask=mine, other=0.0)
        if pulls is not None:
            pull_sums += tl.load(pulls + n[:, None] * RN + direction[None, :], mask=mine[:, None], other=0.0)
        if slopes is not None:
            slope_sums += tl.load(slopes + n[:, None] * 2 + two[None, :], mask=mine[:, None], other=0.0)
        member += 1
        mine = mine & (tl.load(sorted_rows + member, mask=member < num_rows, other=-1) == row)
        more = tl.max(mine.to(tl.int32), axis=0) > 0
    tl.store(scaled_out + position[:, None] * BN + column[None, :], sums, mask=inside[:, None])
    if along is not None:
        tl.store(along_out + position, along_sums, mask=inside)
    if pulls is not None:
        tl.store(pulls_out + position[:, None] * RN + direction[None, :], pull_sums, mask=inside[:, None])
    if slopes is not None:
        tl.store(slopes_out + position[:, None] * 2 + two[None, :], slope_sums, mask=inside[:, None])
    tl.store(targets + position, tl.where(opens, row, -1), mask=inside)


@triton.jit
def row_factors(scaled, along, block, num_rows, M: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """[M, BN] and [M] a row block's `scaled` and `along` (zeros without it).

    The kernel loads them a block ahead: Triton copies x into shared memory several blocks ahead, but not these, whose
    latency every block would wait for. Rows to skip hold zeros, so nothing here waits for the index of a row.
    """
    n, _, inside = positions(block, num_rows, None, M)
    c = tl.load(scaled + n[:, None] * BN + tl.arange(0, BN)[None, :], mask=inside[:, None], other=0.0)
    along_x = tl.zeros((M,), ACC)
    if along is not None:
        along_x = tl.load(along + n, mask=inside, other=0.0)
    return c, along_x


@triton.jit(do_not_specialize=["num_rows", "blocks_each"], do_not_specialize_on_alignment=["rows"])
def outer_kernel(
    hidden, row_stride, weight, rows, norm_weight, centre, precision, directions,
    scaled, along, pulls, slopes, grad_hidden, weight_partials, gain_partials,
    num_rows, d, blocks_each,
    K: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RN: tl.constexpr,
    ACC: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (c, s): columns c BD .. of D and the s-th share of the rows, `blocks_each` blocks of M.

    grad_hidden [stored rows, D] (any float dtype) = scaled @ W' - x along, at the row that x was read from;
    weight_partials [shares, 2K, D] ACC = scaled^T @ x over the share's rows, in ascending order. A negative entry of
    `rows` is skipped. HALVES: x is bf16, and fp32 operands are two bf16 halves each, exact to 2^-16 of each product.

    With `slopes`, the distance's part too: e = rstd dL/df = pulls @ directions + p (slope_0 x g - slope_1 mean), of
    which grad_hidden gets e g and gain_partials [shares, D] the sum of e x.
    """
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    share = tl.program_id(1)
    acc = tl.zeros((BN, BD), ACC)
    gain = tl.zeros((BD,), ACC)
    if slopes is not None:
        g = tl.full((BD,), 1.0, ACC)
        if norm_weight is not None:
            g = vector(norm_weight, columns, columns < d, 0.0, ACC)
        mean = vector(centre, columns, columns < d, 0.0, ACC)
        p = vector(precision, columns, columns < d, 0.0, ACC)
        if pulls is not None:
            direction = tl.arange(0, RN)
            v = tl.trans(direction_tile(directions, columns, d, R, RN, ACC))
            if HALVES:
                v_hi, v_lo = halves(v, UPCAST)
    if grad_hidden is not None:
        w = tl.trans(folded_weight(weight, norm_weight, columns, d, K, BN, ACC))
        if HALVES:
            w_hi, w_lo = halves(w, UPCAST)
    next_c, next_along = row_factors(scaled, along, share * blocks_each, num_rows, M, BN, ACC)
    for block in range(share * blocks_each, (share + 1) * blocks_each):
        c, along_x = next_c, next_along
        next_c, next_along = row_factors(scaled, along, block + 1, num_rows, M, BN, ACC)
        n, row, inside = positions(block, num_rows, rows, M)
        inside = inside & (row >= 0)
        here = inside[:, None] & (columns < d)[None, :]
        if weight_partials is not None or along is not None or slopes is not None:
            at = hidden + (row * row_stride)[:, None] + columns[None, :]
            x = tl.load(at, mask=here, other=0.0, eviction_policy="evict_first")
        if HALVES:
            c_hi, c_lo = halves(c, UPCAST)
        if slopes is not None:
            with_x = tl.load(slopes + 2 * n, mask=inside, other=0.0)[:, None]
            with_mean = tl.load(slopes + 2 * n + 1, mask=inside, other=0.0)[:, None]
            e = p[None, :] * (with_x * (x.to(ACC) * g[None, :]) - with_mean * mean[None, :])
            if pulls is not None:
                pull = tl.load(pulls + n[:, None] * RN + direction[None, :], mask=inside[:, None], other=0.0)
                if HALVES:
                    pull_hi, pull_lo = halves(pull, UPCAST)
                    e = tl.dot(pull_lo, v_hi, e)
                    e = tl.dot(pull_hi, v_lo, e)
                    e = tl.dot(pull_hi, v_hi, e)
                else:
                    e = tl.dot(pull, v, e, input_precision=PRECISION, out_dtype=ACC)
            if gain_partials is not None:
                gain += tl.sum(e * x.to(ACC), axis=0)
        if grad_hidden is not None:
            if HALVES:
                dx = tl.dot(c_lo, w_hi)
                dx = tl.dot(c_hi, w_lo, dx)
                dx = tl.dot(c_hi, w_hi, dx)
            else:
                dx = tl.dot(c, w, input_precision=PRECISION, out_dtype=ACC)
            if slopes is not None:
                dx += e * g[None, :]
            if along is not None:
                dx -= x.to(ACC) * along_x[:, None]
            at = grad_hidden + (row * d)[:, None] + columns[None, :]
            tl.store(at, dx.to(grad_hidden.dtype.element_ty), mask=here)
        if weight_partials is not None:
            if HALVES:
                acc = tl.dot(tl.trans(c_lo), operand(x, UPCAST), acc)
                acc = tl.dot(tl.trans(c_hi), operand(x, UPCAST), acc)
            else:
                acc = tl.dot(tl.trans(c), x.to(ACC), acc, input_precision=PRECISION, out_dtype=ACC)
    if weight_partials is not None:
        source, real = column_rows(K, BN)
        at = (share.to(tl.int64) * (2 * K) + source) * d
        tl.store(weight_partials + at[:, None] + columns[None, :], acc, mask=real[:, None] & (columns < d)[None, :])
    if gain_partials is not None:
        tl.store(gain_partials + share.to(tl.int64) * d + columns, gain, mask=columns < d)


@triton.jit(do_not_specialize=["shares"])
def weight_gradient_kernel(
    weight, norm_weight, weight_partials, gain_partials, grad_weight, grad_norm_weight, shares, d,
    K: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the partials of dW' in ascending order, and from the sum make dW = dW' g and dg = sum_n dW'_n W_n, plus the
    distance's part of dg, if there is one: the sum of gain_partials [shares, D].
    """
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    source, real = column_rows(K, BN)
    at = (source.to(tl.int64) * d)[:, None] + columns[None, :]
    here = real[:, None] & (columns < d)[None, :]
    folded = tl.zeros((BN, BD), ACC)
    for share in tl.range(0, shares, loop_unroll_factor=8):  # eight loads in flight
        offset = tl.cast(share, tl.int64) * (2 * K) * d
        folded += tl.load(weight_partials + offset + at, mask=here, other=0.0)
    if grad_norm_weight is not None:
        w = tl.load(weight + at, mask=here, other=0.0).to(ACC)
        gain = tl.sum(folded * w, axis=0)
        if gain_partials is not None:
            for share in tl.range(0, shares, loop_unroll_factor=8):
                offset = tl.cast(share, tl.int64) * d
                gain += tl.load(gain_partials + offset + columns, mask=columns < d, other=0.0)
        tl.store(grad_norm_weight + columns, gain.to(grad_norm_weight.dtype.element_ty), mask=columns < d)
    if grad_weight is not None:
        if norm_weight is not None:
            folded *= tl.load(norm_weight + columns, mask=columns < d, other=0.0).to(ACC)[None, :]
        tl.store(grad_weight + at, folded.to(grad_weight.dtype.element_ty), mask=here)
