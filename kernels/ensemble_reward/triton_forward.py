"""Triton kernels of the forward: one launch from hidden states to centred rewards.

A separate kernel centres many rows by label; the backward uses it too.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_math import aggregate, column_rows, noise, positions, product, scaled_product, split_heads

# How programs hand results to the last one: plain stores, a barrier, then an atomic add with acquire and release at gpu
# scope. The program whose add completes the count sees all stores; it reads past its L1 (.cg), which may hold older
# lines.


@triton.jit(do_not_specialize=["num_rows", "blocks_each", "size", "head_or_count"])
def forward_kernel(
    hidden, row_stride, weight, bias, rows, norm_weight, seed, shift, scale, std_ref, labels,
    reward, mean_out, std_out, reward_sum, saved, partials, shares, table, counters,
    num_rows, d, blocks_each, size, head_or_count, coefficient: tl.float64, norm_eps: tl.float64, std_floor: tl.float64,
    K: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr, FROM_SAMPLE: tl.constexpr,
    CENTRE: tl.constexpr, SPAN: tl.constexpr, SWEEP: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, HALVES: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (p, s): rows p M .. p M + M - 1, blocks s blocks_each .. of BD columns of D; SPLITS = 1: whole rows.

    reward [N], mean_out and std_out [N, K], reward_sum [], saved [N, 2K + 1] or None, all ACC. Scratch in ACC: shares
    (SPLITS [programs M, BN], then SPLITS [programs M]), partials [programs], table [SWEEP] for centring by label.
    counters [1 + programs] int32 are 0 before and after, so a CUDA graph can be replayed. The last program of a row
    block adds the block's shares in ascending order and computes the outputs; the last row block adds the reward sums
    in ascending order and centres. The order of arrival changes no bit.
    """
    block = tl.program_id(0)
    n, row, inside = positions(block, num_rows, rows, M)
    if SPLITS == 1:
        acc, squares = product(
            hidden=hidden, row_stride=row_stride, weight=weight, norm_weight=norm_weight, row=row, inside=inside,
            first=0, end=d, d=d, K=K, M=M, BD=BD, BN=BN, ACC=ACC, HALVES=HALVES, EXACT=EXACT,
            PRECISION=PRECISION, UPCAST=UPCAST,
        )  # fmt: skip
        finish_rows(
            acc=acc, squares=squares, n=n, inside=inside, num_rows=num_rows, d=d,
            norm_weight=norm_weight, norm_eps=norm_eps, bias=bias, shift=shift, scale=scale, std_floor=std_floor,
            seed=seed, std_ref=std_ref, head_or_count=head_or_count, coefficient=coefficient, labels=labels, size=size,
            reward=reward, mean_out=mean_out, std_out=std_out, reward_sum=reward_sum, saved=saved,
            partials=partials, table=table, counters=counters,
            K=K, KIND=KIND, NOMINAL=NOMINAL, FROM_SAMPLE=FROM_SAMPLE, CENTRE=CENTRE, SPAN=SPAN, SWEEP=SWEEP,
            M=M, BN=BN, ACC=ACC,
        )  # fmt: skip
    else:
        split = tl.program_id(1)
        first = split * (blocks_each * BD)
        end = tl.minimum(first + blocks_each * BD, d)
        acc, squares = product(
            hidden=hidden, row_stride=row_stride, weight=weight, norm_weight=norm_weight, row=row, inside=inside,
            first=first, end=end, d=d, K=K, M=M, BD=BD, BN=BN, ACC=ACC, HALVES=HALVES, EXACT=EXACT,
            PRECISION=PRECISION, UPCAST=UPCAST,
        )  # fmt: skip
        column = tl.arange(0, BN)
        padded = tl.cast(tl.num_programs(0), tl.int64) * M
        share_squares = shares + SPLITS * padded * BN
        tl.store(shares + ((split * padded + n) * BN)[:, None] + column[None, :], acc)
        tl.store(share_squares + split * padded + n, squares)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + 1 + block, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            whole = tl.zeros((M, BN), ACC)
            whole_squares = tl.zeros((M,), ACC)
            for s in tl.static_range(SPLITS):  # unrolled: the loads do not wait for one another
                at = s * padded + n
                whole += tl.load(shares + (at * BN)[:, None] + column[None, :], cache_modifier=".cg")
                whole_squares += tl.load(share_squares + at, cache_modifier=".cg")
            tl.store(counters + 1 + block, 0)
            finish_rows(
                acc=whole, squares=whole_squares, n=n, inside=inside, num_rows=num_rows, d=d,
                norm_weight=norm_weight, norm_eps=norm_eps, bias=bias, shift=shift, scale=scale, std_floor=std_floor,
                seed=seed, std_ref=std_ref, head_or_count=head_or_count, coefficient=coefficient, labels=labels,
                size=size, reward=reward, mean_out=mean_out, std_out=std_out, reward_sum=reward_sum, saved=saved,
                partials=partials, table=table, counters=counters,
                K=K, KIND=KIND, NOMINAL=NOMINAL, FROM_SAMPLE=FROM_SAMPLE, CENTRE=CENTRE, SPAN=SPAN, SWEEP=SWEEP,
                M=M, BN=BN, ACC=ACC,
            )  # fmt: skip


@triton.jit
def finish_rows(
    acc, squares, n, inside, bias, norm_weight, seed, shift, scale, std_ref, labels,
    reward, mean_out, std_out, reward_sum, saved, partials, table, counters,
    num_rows, d, size, head_or_count, coefficient, norm_eps, std_floor,
    K: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr, FROM_SAMPLE: tl.constexpr,
    CENTRE: tl.constexpr, SPAN: tl.constexpr, SWEEP: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute a row block's outputs from its product [M, BN]; the last row block to arrive also totals and centres."""
    KP: tl.constexpr = BN // 2
    block = tl.program_id(0)
    heads = tl.arange(0, KP)
    z, rstd = scaled_product(acc, squares, norm_weight, norm_eps, d, M, ACC)
    if saved is not None:
        source, is_real = column_rows(K, BN)
        kept = saved + n * (2 * K + 1)
        tl.store(kept[:, None] + source[None, :], z, mask=inside[:, None] & is_real[None, :])
        tl.store(kept + 2 * K, rstd, mask=inside)
    mean, std, _ = split_heads(z=z, bias=bias, shift=shift, scale=scale, std_floor=std_floor, K=K, M=M, BN=BN, ACC=ACC)
    values = mean
    if FROM_SAMPLE:
        values = mean + std * noise(seed, n, heads, K, ACC)
    total = aggregate(
        mean=mean, std=std, values=values, std_ref=std_ref, coefficient=coefficient, head_or_count=head_or_count,
        heads=heads, K=K, KP=KP, KIND=KIND, NOMINAL=NOMINAL, ACC=ACC,
    )  # fmt: skip

    at = n[:, None] * K + heads[None, :]
    real = inside[:, None] & (heads < K)[None, :]
    tl.store(mean_out + at, mean, mask=real)
    tl.store(std_out + at, std, mask=real)
    centred = total
    if CENTRE == "block":  # groups of SPAN rows, whole within a row block
        members = tl.reshape(total, (M // SPAN, SPAN))
        centred = tl.reshape(members - (tl.sum(members, axis=1) / SPAN)[:, None], (M,))
    tl.store(reward + n, centred, mask=inside)
    tl.store(partials + block, tl.sum(tl.where(inside, total, 0.0), axis=0))

    programs = tl.num_programs(0)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu")
    if arrived == programs - 1:
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
            centre_by_label(reward, labels, table, num_rows, SWEEP, ACC)
        tl.store(counters, 0)


@triton.jit
def centre_batch(reward, average, num_rows, SWEEP: tl.constexpr):
    """Subtract `average` from reward [N] in place. One program does it, in wide sweeps that hide latency."""
    lane = tl.arange(0, SWEEP)
    for start in range(0, num_rows, SWEEP):
        index = tl.cast(start, tl.int64) + lane
        value = tl.load(reward + index, mask=index < num_rows, other=0.0, cache_modifier=".cg")
        tl.store(reward + index, value - average, mask=index < num_rows)


@triton.jit
def centre_by_size(reward, num_rows, size, SPAN: tl.constexpr, SWEEP: tl.constexpr, ACC: tl.constexpr):
    """Subtract from reward [N] its mean over each `size` consecutive rows, in place, SWEEP // SPAN groups at a time.

    SPAN: `size` padded to a power of two, at most SWEEP; larger groups take several steps.
    """
    EACH: tl.constexpr = SWEEP // SPAN
    inner = tl.arange(0, SPAN)
    for start in range(0, num_rows // size, EACH):
        group = tl.cast(start, tl.int64) + tl.arange(0, EACH)
        at = group[:, None] * size + inner[None, :]
        present = (group < num_rows // size)[:, None]
        sums = tl.zeros((EACH, SPAN), ACC)
        for step in range(0, size, SPAN):
            here = present & (step + inner < size)[None, :]
            sums += tl.load(reward + at + step, mask=here, other=0.0, cache_modifier=".cg")
        average = tl.sum(sums, axis=1) / size
        for step in range(0, size, SPAN):
            here = present & (step + inner < size)[None, :]
            value = tl.load(reward + at + step, mask=here, other=0.0, cache_modifier=".cg")
            tl.store(reward + at + step, value - average[:, None], mask=here)


@triton.jit
def centre_by_label(reward, labels, table, num_rows, SWEEP: tl.constexpr, ACC: tl.constexpr):
    """Subtract from reward [N <= SWEEP] the mean of its label, in place.

    Registers hold all rewards and labels, which are compared with 8 labels at a time up to the largest: N (largest + 1)
    comparisons, so N must be small (configs.MAX_LABELLED_ROWS).
    """
    lane = tl.arange(0, SWEEP)
    inside = lane < num_rows
    value = tl.load(reward + lane, mask=inside, other=0.0, cache_modifier=".cg")
    label = tl.load(labels + lane, mask=inside, other=-1).to(tl.int32)
    for start in range(0, tl.minimum(tl.max(label, axis=0) + 1, num_rows), 8):
        which = start + tl.arange(0, 8)
        same = which[:, None] == label[None, :]
        sums = tl.sum(tl.where(same, value[None, :], 0.0), axis=1)
        count = tl.sum(same.to(tl.int32), axis=1)
        tl.store(table + which, sums / tl.maximum(count, 1), mask=which < SWEEP)
    tl.debug_barrier()
    known = inside & (label >= 0) & (label < num_rows)
    average = tl.load(table + label, mask=known, other=0.0, cache_modifier=".cg")
    tl.store(reward + lane, value - average, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def centre_kernel(values, value_stride, out, labels, order, num_rows, SWEEP: tl.constexpr, ACC: tl.constexpr):
    """out = values minus the mean of their label, [N]; in place if out is values.

    `labels` are sorted, and `order` gives the row of each. The program at the first position of a run of equal labels
    sums the run in a fixed order and centres it; the other programs have nothing to do.
    """
    lane = tl.arange(0, SWEEP)
    start = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + start)
    before = tl.load(labels + start - 1, mask=start > 0, other=-1)
    sums = tl.zeros((SWEEP,), ACC)
    count = tl.zeros((SWEEP,), tl.int32)
    position = start
    more = label != before
    while more:
        mine = tl.load(labels + position + lane, mask=position + lane < num_rows, other=-1) == label
        row = tl.load(order + position + lane, mask=mine, other=0)
        sums += tl.load(values + row * value_stride, mask=mine, other=0.0).to(ACC)
        count += mine.to(tl.int32)
        position += SWEEP
        more = (tl.sum(mine.to(tl.int32), axis=0) == SWEEP) & (position < num_rows)
    members = tl.sum(count, axis=0)
    average = tl.sum(sums, axis=0) / tl.maximum(members, 1)
    for done in range(0, members, SWEEP):
        index = start + done + lane
        mine = index < start + members
        row = tl.load(order + index, mask=mine, other=0)
        value = tl.load(values + row * value_stride, mask=mine, other=0.0).to(ACC)
        tl.store(out + row, value - average, mask=mine)
