"""Triton device code that ends a batch: the last program's worst head and centring, and a kernel that centres many rows
by label, which the backward uses too.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from ..triton_arrivals import stored
from .triton_math import least, noise_at, scalar


@triton.jit
def add_batch_worst(
    reward, mean_out, std_out, saved, seed, head_sums, programs, num_rows, coefficient,
    K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, FROM_SAMPLE: tl.constexpr,
    WIDTH: tl.constexpr, ACC: tl.constexpr, STORES_DONE: tl.constexpr,
):  # fmt: skip
    """Choose the batch's worst head k* = argmin_k mean_n value_nk (BRME eq. 6) from `head_sums` [programs, KP] fp64,
    and add its share of every row to reward [N], in place; returns the sum of the rewards.

    One program does it. It makes the samples again from mean and std, WIDTH rows at a time: with 4096, their random
    bits would spill. k* goes to the last of `saved`'s S columns.
    """
    EACH: tl.constexpr = 1024 // KP
    heads, some = tl.arange(0, KP), tl.arange(0, EACH)
    sums = tl.zeros((EACH, KP), tl.float64)
    for start in range(0, programs, EACH):
        at = head_sums + (start + some)[:, None] * KP + heads[None, :]
        sums += tl.load(at, mask=(start + some < programs)[:, None], other=0.0, cache_modifier=".cg")
    average = (tl.sum(sums, axis=0) / num_rows)[None, :]
    worst = tl.sum(tl.sum(tl.where(least(average, heads, K, KP), heads[None, :], 0), axis=1), axis=0)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), ACC)
    for start in range(0, num_rows, WIDTH):
        n = tl.cast(start, tl.int64) + lane
        inside = n < num_rows
        value = tl.load(mean_out + n * K + worst, mask=inside, other=0.0, cache_modifier=".cg")
        if FROM_SAMPLE:
            std = tl.load(std_out + n * K + worst, mask=inside, other=0.0, cache_modifier=".cg")
            value += std * noise_at(seed, n * K + worst, ACC)
        if KIND == "tradeoff":
            value *= 1.0 - scalar(coefficient, ACC)
        value += tl.load(reward + n, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(reward + n, value, mask=inside)
        total += tl.where(inside, value, 0.0)
        if saved is not None:
            tl.store(saved + n * S + (S - 1), worst.to(ACC), mask=inside)
    stored(STORES_DONE)  # centring reads the rewards in other threads
    return tl.sum(total, axis=0)


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
def centre_by_label(reward, labels, table, num_rows, SWEEP: tl.constexpr, ACC: tl.constexpr, STORES_DONE: tl.constexpr):
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
    stored(STORES_DONE)
    known = inside & (label >= 0) & (label < num_rows)
    average = tl.load(table + label, mask=known, other=0.0, cache_modifier=".cg")
    tl.store(reward + lane, value - average, mask=inside)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["values"])
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
