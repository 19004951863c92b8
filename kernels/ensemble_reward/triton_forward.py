"""Triton kernel of the forward: one launch from hidden states to centred rewards; and the group centring beside it."""
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_math import aggregate, noise, positions, product, split_heads


@triton.jit(do_not_specialize=["num_rows", "pick"])
def forward_kernel(
    hidden, row_stride, weight, bias, rows, norm_weight, seed, shift, scale, std_ref,
    reward, mean_out, std_out, reward_sum, partials, counter,
    num_rows, d, pick, coefficient: tl.float64, norm_eps: tl.float64, std_floor: tl.float64,
    K: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr, FROM_SAMPLE: tl.constexpr, CENTRE: tl.constexpr,
    M: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SWEEP: tl.constexpr,
    ACC: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program p: rows p M .. p M + M - 1 whole, their partial reward sum; the last to arrive also totals and centres.

    reward [N], mean_out and std_out [N, K], reward_sum [], all ACC; partials [programs] ACC is scratch; counter [1]
    int32 is 0 before and after, so a CUDA graph replays it. The total adds the partials in program order whoever is
    last, so it has the same bits in every run.
    """
    KP: tl.constexpr = BN // 2
    program = tl.program_id(0)
    heads = tl.arange(0, KP)
    n, row, inside = positions(program, num_rows, rows, M)
    z, _ = product(hidden, row_stride, weight, norm_weight, norm_eps, row, inside, d,
                   K, M, BD, BN, ACC, HALVES, PRECISION, UPCAST)  # fmt: skip
    mean, std, _ = split_heads(z, bias, shift, scale, std_floor, K, M, BN, ACC)
    values = mean
    if FROM_SAMPLE:
        values = mean + std * noise(seed, n, heads, K, ACC)
    total = aggregate(mean, std, values, std_ref, coefficient, pick, heads, K, KP, KIND, NOMINAL, ACC)

    at = n[:, None] * K + heads[None, :]
    real = inside[:, None] & (heads < K)[None, :]
    tl.store(mean_out + at, mean, mask=real)
    tl.store(std_out + at, std, mask=real)
    tl.store(reward + n, total, mask=inside)
    tl.store(partials + program, tl.sum(tl.where(inside, total, 0.0), axis=0))

    # Every store above is visible to whoever reads `counter` after this program's add: barrier, then release at gpu
    # scope. The reads below bypass L1 (.cg), which may hold older lines.
    programs = tl.num_programs(0)
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == programs - 1:
        lane = tl.arange(0, SWEEP)
        sums = tl.zeros((SWEEP,), ACC)
        for start in range(0, programs, SWEEP):
            sums += tl.load(partials + start + lane, mask=start + lane < programs, other=0.0, cache_modifier=".cg")
        batch = tl.sum(sums, axis=0)
        tl.store(reward_sum, batch)
        if CENTRE:
            average = batch / num_rows
            for start in range(0, num_rows, SWEEP):
                index = tl.cast(start, tl.int64) + lane
                value = tl.load(reward + index, mask=index < num_rows, other=0.0, cache_modifier=".cg")
                tl.store(reward + index, value - average, mask=index < num_rows)
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["num_rows", "size"])
def centre_kernel(values, value_stride, out, labels, order, num_rows, size, SWEEP: tl.constexpr, ACC: tl.constexpr):
    """out = values minus their group's mean, [N]; in place if out is values.

    By size: program p owns rows p size .. p size + size - 1. By label: `labels` ascending and `order` their rows; the
    program whose place opens a run of equal labels owns the run and the others leave. One program sums a group in a
    fixed order, so the bits are the same in every run, with no atomics.
    """
    lane = tl.arange(0, SWEEP)
    start = tl.program_id(0).to(tl.int64)
    end = num_rows.to(tl.int64)
    if labels is not None:
        label = tl.load(labels + start)
        before = tl.load(labels + start - 1, mask=start > 0, other=-1)
        if label == before:
            return
    else:
        start *= size
        end = start + size
    sums = tl.zeros((SWEEP,), ACC)
    count = tl.zeros((SWEEP,), tl.int32)
    place = start
    more = place < end
    while more:
        index = place + lane
        mine = index < end
        row = index
        if labels is not None:
            mine = mine & (tl.load(labels + index, mask=mine, other=-1) == label)
            row = tl.load(order + index, mask=mine, other=0)
        sums += tl.load(values + row * value_stride, mask=mine, other=0.0).to(ACC)
        count += mine.to(tl.int32)
        place += SWEEP
        more = (tl.sum(mine.to(tl.int32), axis=0) == SWEEP) & (place < end)
    members = tl.sum(count, axis=0)
    average = tl.sum(sums, axis=0) / members
    for done in range(0, members, SWEEP):
        index = start + done + lane
        mine = index < start + members
        row = index
        if labels is not None:
            row = tl.load(order + index, mask=mine, other=0)
        value = tl.load(values + row * value_stride, mask=mine, other=0.0).to(ACC)
        tl.store(out + row, value - average, mask=mine)
