"""Triton kernel of the forward: one launch from hidden states to centred rewards."""
# mypy: ignore-errors

import triton
import triton.language as tl

from ..triton_arrivals import arrive
from .triton_centre import add_batch_worst, centre_batch, centre_by_label, centre_by_size
from .triton_math import (
    ANY_ADDRESS,
    aggregate,
    column_rows,
    folded_weight,
    halves,
    noise,
    operand,
    positions,
    scalar,
    split_heads,
)
from .triton_trust import (
    add_lengths,
    add_projections,
    add_region_shares,
    keep_region_share,
    priced,
    region_parts,
    root,
    store_region,
)


@triton.jit(
    do_not_specialize=["num_rows", "blocks_each", "size", "head_or_count"], do_not_specialize_on_alignment=ANY_ADDRESS
)
def forward_kernel(
    hidden, row_stride, weight, bias, rows, norm_weight, seed, shift, scale, std_ref, labels,
    centre, precision, directions, weights, unit, rms,
    reward, mean_out, std_out, reward_sum, distance, saved,
    partials, head_sums, shares, region_shares, table, counters,
    num_rows, d, blocks_each, size, head_or_count, coefficient: tl.float64, norm_eps: tl.float64, std_floor: tl.float64,
    trust: tl.float64, trust_from: tl.float64,
    K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr,
    OF_BATCH: tl.constexpr, POWER: tl.constexpr, FROM_SAMPLE: tl.constexpr,
    CENTRE: tl.constexpr, SPAN: tl.constexpr, SWEEP: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RN: tl.constexpr,
    ACC: tl.constexpr, HALVES: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    STORES_DONE: tl.constexpr,
):  # fmt: skip
    """Program (p, s): rows p M .. p M + M - 1, blocks s blocks_each .. of BD columns of D; SPLITS = 1: whole rows.

    reward [N], mean_out and std_out [N, K], reward_sum [], distance [N] or None, saved [N, S] or None, all ACC. Scratch
    in ACC: shares (SPLITS [programs M, BN], then SPLITS [programs M]), region_shares (triton_trust.py), partials
    [programs], table [SWEEP] for centring by label; head_sums [programs, KP] fp64, with OF_BATCH. POWER: of the
    distance's price, 0 without one.
    counters [1 + programs] int32 are 0 before and after, so a CUDA graph can be replayed. The last program of a row
    block adds the block's shares in ascending order and computes the outputs; the last row block adds the reward sums
    in ascending order and centres. The order of arrival changes no bit.
    """
    block = tl.program_id(0)
    n, row, inside = positions(block, num_rows, rows, M)
    if SPLITS == 1:
        acc, squares, lengths, crosses, spread, along, pull = product(
            hidden=hidden, row_stride=row_stride, weight=weight, norm_weight=norm_weight, centre=centre,
            precision=precision, directions=directions, rms=rms, row=row, inside=inside, first=0, end=d, d=d,
            K=K, R=R, M=M, BD=BD, BN=BN, RN=RN, ACC=ACC, HALVES=HALVES, EXACT=EXACT, PRECISION=PRECISION,
            UPCAST=UPCAST,
        )  # fmt: skip
        finish_rows(
            acc=acc, squares=squares, lengths=lengths, crosses=crosses, spread=spread, along=along, pull=pull,
            n=n, inside=inside, num_rows=num_rows, d=d, norm_weight=norm_weight, norm_eps=norm_eps, bias=bias,
            shift=shift, scale=scale, std_floor=std_floor, seed=seed, std_ref=std_ref, head_or_count=head_or_count,
            coefficient=coefficient, weights=weights, unit=unit, rms=rms, trust=trust, trust_from=trust_from,
            labels=labels, size=size, reward=reward, mean_out=mean_out, std_out=std_out, reward_sum=reward_sum,
            distance=distance, saved=saved, partials=partials, head_sums=head_sums, table=table, counters=counters,
            K=K, R=R, S=S, KIND=KIND, NOMINAL=NOMINAL, OF_BATCH=OF_BATCH, POWER=POWER, FROM_SAMPLE=FROM_SAMPLE,
            CENTRE=CENTRE, SPAN=SPAN, SWEEP=SWEEP, M=M, BN=BN, RN=RN, ACC=ACC, STORES_DONE=STORES_DONE,
        )  # fmt: skip
    else:
        split = tl.program_id(1)
        first = split * (blocks_each * BD)
        end = tl.minimum(first + blocks_each * BD, d)
        acc, squares, lengths, crosses, spread, along, pull = product(
            hidden=hidden, row_stride=row_stride, weight=weight, norm_weight=norm_weight, centre=centre,
            precision=precision, directions=directions, rms=rms, row=row, inside=inside, first=first, end=end, d=d,
            K=K, R=R, M=M, BD=BD, BN=BN, RN=RN, ACC=ACC, HALVES=HALVES, EXACT=EXACT, PRECISION=PRECISION,
            UPCAST=UPCAST,
        )  # fmt: skip
        column = tl.arange(0, BN)
        padded = tl.cast(tl.num_programs(0), tl.int64) * M
        share_squares = shares + SPLITS * padded * BN
        tl.store(shares + ((split * padded + n) * BN)[:, None] + column[None, :], acc)
        tl.store(share_squares + split * padded + n, squares)
        if distance is not None:
            keep_region_share(
                shares=region_shares, split=split, n=n, lengths=lengths, crosses=crosses, spread=spread, along=along,
                pull=pull, norm_weight=norm_weight, SPLITS=SPLITS, R=R, RN=RN, M=M,
            )  # fmt: skip
        if arrive(counters + 1 + block, STORES_DONE) == SPLITS - 1:
            whole = tl.zeros((M, BN), ACC)
            whole_squares = tl.zeros((M,), ACC)
            for s in tl.static_range(SPLITS):  # unrolled: the loads do not wait for one another
                at = s * padded + n
                whole += tl.load(shares + (at * BN)[:, None] + column[None, :], cache_modifier=".cg")
                whole_squares += tl.load(share_squares + at, cache_modifier=".cg")
            if distance is not None:
                lengths, crosses, spread, along, pull = add_region_shares(
                    shares=region_shares, n=n, norm_weight=norm_weight, SPLITS=SPLITS, R=R, RN=RN, M=M, ACC=ACC
                )
            tl.store(counters + 1 + block, 0)
            finish_rows(
                acc=whole, squares=whole_squares, lengths=lengths, crosses=crosses, spread=spread, along=along,
                pull=pull, n=n, inside=inside, num_rows=num_rows, d=d, norm_weight=norm_weight, norm_eps=norm_eps,
                bias=bias, shift=shift, scale=scale, std_floor=std_floor, seed=seed, std_ref=std_ref,
                head_or_count=head_or_count, coefficient=coefficient, weights=weights, unit=unit, rms=rms, trust=trust,
                trust_from=trust_from, labels=labels, size=size, reward=reward, mean_out=mean_out, std_out=std_out,
                reward_sum=reward_sum, distance=distance, saved=saved, partials=partials, head_sums=head_sums,
                table=table, counters=counters,
                K=K, R=R, S=S, KIND=KIND, NOMINAL=NOMINAL, OF_BATCH=OF_BATCH, POWER=POWER, FROM_SAMPLE=FROM_SAMPLE,
                CENTRE=CENTRE, SPAN=SPAN, SWEEP=SWEEP, M=M, BN=BN, RN=RN, ACC=ACC, STORES_DONE=STORES_DONE,
            )  # fmt: skip


@triton.jit
def product(
    hidden, row_stride, weight, norm_weight, centre, precision, directions, rms, row, inside, first, end, d,
    K: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RN: tl.constexpr,
    ACC: tl.constexpr, HALVES: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[M, BN] x @ (norm_weight * weight).T and [M] sum of x^2 (zeros without a norm) over columns first .. end - 1;
    with `precision`, the trust region's sums too.

    x is read once (evict_first). HALVES: x is bf16, and the folded weight is split into two bf16 halves; EXACT: that
    weight is bf16 itself, so its low half is 0 and is left out.
    """
    acc = tl.zeros((M, BN), ACC)
    squares, lengths, crosses = tl.zeros((M,), ACC), tl.zeros((M,), ACC), tl.zeros((M,), ACC)
    spread, along, pull = tl.zeros((1,), ACC), tl.zeros((M, RN), ACC), tl.zeros((RN,), ACC)
    size = 1.0  # of the rows, beside a mean of normed features
    if precision is not None and norm_weight is not None:
        size = tl.load(rms).to(ACC)
    at = hidden + row * row_stride
    for start in range(first, end, BD):
        columns = start + tl.arange(0, BD)
        here = inside[:, None] & (columns < d)[None, :]
        x = tl.load(at[:, None] + columns[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        w = folded_weight(weight, norm_weight, columns, d, K, BN, ACC)
        if norm_weight is not None:
            squares += tl.sum(x.to(ACC) * x.to(ACC), axis=1)
        if precision is not None:
            t, lengths, crosses, spread = add_lengths(
                x=x, norm_weight=norm_weight, centre=centre, precision=precision, size=size, columns=columns, d=d,
                lengths=lengths, crosses=crosses, spread=spread, ACC=ACC,
            )  # fmt: skip
            if R > 0:
                along, pull = add_projections(
                    x=x, t=t, norm_weight=norm_weight, centre=centre, directions=directions, columns=columns, d=d,
                    along=along, pull=pull, R=R, RN=RN, ACC=ACC, HALVES=HALVES, PRECISION=PRECISION, UPCAST=UPCAST,
                )  # fmt: skip
        if HALVES:
            hi, lo = halves(w, UPCAST)
            if not EXACT:
                acc = tl.dot(operand(x, UPCAST), lo, acc)
            acc = tl.dot(operand(x, UPCAST), hi, acc)
        else:
            acc = tl.dot(x.to(ACC), w, acc, input_precision=PRECISION, out_dtype=ACC)
    if HALVES and R > 0:
        along -= (pull * size)[None, :]
    return acc, squares, lengths, crosses, spread, along, pull


@triton.jit
def scaled_product(acc, squares, norm_weight, norm_eps, d, M: tl.constexpr, ACC: tl.constexpr):
    """[M, BN] the product after the norm and before the bias, [M] rstd (1 without a norm)."""
    rstd = tl.full((M,), 1.0, ACC)
    if norm_weight is not None:
        rstd = 1.0 / tl.sqrt(squares / d + scalar(norm_eps, ACC))
        acc *= rstd[:, None]
    return acc, rstd


@triton.jit
def finish_rows(
    acc, squares, lengths, crosses, spread, along, pull, n, inside, bias, norm_weight, seed, shift, scale, std_ref,
    weights, unit, rms, labels, reward, mean_out, std_out, reward_sum, distance, saved,
    partials, head_sums, table, counters,
    num_rows, d, size, head_or_count, coefficient, norm_eps, std_floor, trust, trust_from,
    K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr,
    OF_BATCH: tl.constexpr, POWER: tl.constexpr, FROM_SAMPLE: tl.constexpr,
    CENTRE: tl.constexpr, SPAN: tl.constexpr, SWEEP: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, RN: tl.constexpr, ACC: tl.constexpr, STORES_DONE: tl.constexpr,
):  # fmt: skip
    """Compute a row block's outputs from its sums; the last row block to arrive also totals and centres."""
    KP: tl.constexpr = BN // 2
    block = tl.program_id(0)
    heads = tl.arange(0, KP)
    z, rstd = scaled_product(acc, squares, norm_weight, norm_eps, d, M, ACC)
    if saved is not None:
        source, is_real = column_rows(K, BN)
        kept = saved + n * S
        tl.store(kept[:, None] + source[None, :], z, mask=inside[:, None] & is_real[None, :])
        tl.store(kept + 2 * K, rstd, mask=inside)
    mean, std, _ = split_heads(z=z, bias=bias, shift=shift, scale=scale, std_floor=std_floor, K=K, M=M, BN=BN, ACC=ACC)
    values = mean
    if FROM_SAMPLE:
        values = mean + std * noise(seed, n, heads, K, ACC)
    total = aggregate(
        mean=mean, std=std, values=values, std_ref=std_ref, coefficient=coefficient, head_or_count=head_or_count,
        heads=heads, K=K, KP=KP, KIND=KIND, NOMINAL=NOMINAL, OF_BATCH=OF_BATCH, ACC=ACC,
    )  # fmt: skip
    if distance is not None:
        squared, towards, along = region_parts(
            lengths=lengths, crosses=crosses, spread=spread, along=along, pull=pull, rstd=rstd,
            norm_weight=norm_weight, weights=weights, rms=rms, R=R, RN=RN, ACC=ACC,
        )  # fmt: skip
        tl.store(distance + n, root(squared), mask=inside)
        if POWER > 0:
            total -= priced(root(squared), unit, trust, trust_from, POWER, ACC)
        if saved is not None:
            store_region(saved + n * S + (2 * K + 1), inside, squared, towards, along, R, RN)

    at = n[:, None] * K + heads[None, :]
    real = inside[:, None] & (heads < K)[None, :]
    tl.store(mean_out + at, mean, mask=real)
    tl.store(std_out + at, std, mask=real)
    centred = total
    if CENTRE == "block":  # groups of SPAN rows, whole within a row block
        members = tl.reshape(total, (M // SPAN, SPAN))
        centred = tl.reshape(members - (tl.sum(members, axis=1) / SPAN)[:, None], (M,))
    tl.store(reward + n, centred, mask=inside)
    if OF_BATCH:
        tl.store(head_sums + block * KP + heads, tl.sum(tl.where(real, values, 0.0).to(tl.float64), axis=0))
    else:
        tl.store(partials + block, tl.sum(tl.where(inside, total, 0.0), axis=0))

    programs = tl.num_programs(0)
    if arrive(counters, STORES_DONE) == programs - 1:
        if OF_BATCH:
            batch = add_batch_worst(
                reward=reward, mean_out=mean_out, std_out=std_out, saved=saved, seed=seed, head_sums=head_sums,
                programs=programs, num_rows=num_rows, coefficient=coefficient, K=K, KP=KP, S=S, KIND=KIND,
                FROM_SAMPLE=FROM_SAMPLE, WIDTH=SWEEP if SWEEP < 1024 else 1024, ACC=ACC, STORES_DONE=STORES_DONE,
            )  # fmt: skip
        else:
            lane = tl.arange(0, 1024)
            sums = tl.zeros((1024,), ACC)
            for start in range(0, programs, 1024):
                sums += tl.load(partials + start + lane, mask=start + lane < programs, other=0.0, cache_modifier=".cg")
            batch = tl.sum(sums, axis=0)
        tl.store(reward_sum, batch)
        if CENTRE == "batch":
            centre_batch(reward, batch / num_rows, num_rows, SWEEP)
        elif CENTRE == "size":
            centre_by_size(reward, num_rows, size, SPAN, SWEEP, ACC)
        elif CENTRE == "label":
            centre_by_label(reward, labels, table, num_rows, SWEEP, ACC, STORES_DONE)
        tl.store(counters, 0)
