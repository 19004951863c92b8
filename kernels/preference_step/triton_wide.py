"""Triton device code of `preference_step` for features wider than a program can hold: two reads, column by column.

The first kernel computes every row's products and coefficients, the second the directions of the gradient from the
coefficients. Between them 4 bytes a row and direction go through memory. Splits, rows of a block, partial sums and
their order are those of triton_kernels.py, whose `finish_kernel` adds them.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from ..ensemble_reward.triton_math import vector
from .triton_kernels import SUMS, differentiate, mean_bias, places, read_rows, share_of


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["bias", "rows", "p_hat", "margin", "seed"])
def coefficient_kernel(
    features, row_stride, weight, reward_weight, bias, rows, order, starts, p_hat, margin, seed, coefficients, sums,
    pairs, d, alpha: tl.float64, centre: tl.float64, std_floor: tl.float64,
    K: tl.constexpr, KP: tl.constexpr, BRME: tl.constexpr, CENTRE: tl.constexpr, BSR: tl.constexpr,
    MP: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (s, h) as in `step_kernel`: the coefficients [C, P, 2] ACC of its pairs in the order of `order`, chosen
    and rejected side by side, for eq. 8's mean and raw std, then for the direction that all heads share.
    """
    REWARDED: tl.constexpr = CENTRE or BSR or not BRME
    share, shares, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    own = weight + head.to(tl.int64) * d
    lane = tl.arange(0, 2 * MP)
    begin, end = share_of(starts, pairs, head, share, shares, MP)
    line = tl.zeros((SUMS,), ACC)
    for start in range(begin, end, MP):
        pair, n, row, inside = places(rows, order, start, end, pairs, MP)
        # summed over column blocks before the lanes, which exchange numbers only once a block of pairs
        to_mean = tl.zeros((2 * MP, BD), ACC)
        to_raw = tl.zeros((2 * MP, BD), ACC)
        to_reward = tl.zeros((2 * MP, BD), ACC)
        for first in tl.range(0, d, BD, num_stages=STAGES):
            columns = first + tl.arange(0, BD)
            here = columns < d
            wide = read_rows(features, row_stride, row, inside, columns, d).to(ACC)
            if BRME:
                to_mean += wide * vector(own, columns, here, 0.0, ACC)[None, :]
                to_raw += wide * vector(own + tl.cast(K, tl.int64) * d, columns, here, 0.0, ACC)[None, :]
            if REWARDED:
                to_reward += wide * vector(reward_weight, columns, here, 0.0, ACC)[None, :]
        mean, raw, reward = tl.sum(to_mean, axis=1), tl.sum(to_raw, axis=1), tl.sum(to_reward, axis=1)
        if BRME:
            mean += tl.load(bias + head).to(ACC)
            raw += tl.load(bias + K + head).to(ACC)
        if REWARDED:
            reward += mean_bias(bias, K, KP, ACC)
        c_mean, c_raw, c_shared, line = differentiate(
            line=line, mean=mean, raw=raw, reward=reward, pair=pair, n=n, inside=inside, p_hat=p_hat, margin=margin,
            seed=seed, start=start, end=end, pairs=pairs, head=head, alpha=alpha, centre=centre, std_floor=std_floor,
            K=K, BRME=BRME, CENTRE=CENTRE, BSR=BSR, MP=MP, ACC=ACC,
        )  # fmt: skip
        to = coefficients + 2 * start + lane
        if BRME:
            tl.store(to, c_mean, mask=inside)
            tl.store(to + 2 * tl.cast(pairs, tl.int64), c_raw, mask=inside)
            to += 4 * tl.cast(pairs, tl.int64)
        if CENTRE or not BRME:
            tl.store(to, c_shared, mask=inside)
    program = head.to(tl.int64) * shares + share
    tl.store(sums + program * SUMS + tl.arange(0, SUMS), line)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["rows"])
def direction_kernel(
    features, row_stride, rows, order, starts, coefficients, partials, pairs, d,
    BRME: tl.constexpr, CENTRE: tl.constexpr, BSR: tl.constexpr,
    MP: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (s, h, c): columns c BD .. of the partials [heads, shares, G, D] ACC of `step_kernel`."""
    G: tl.constexpr = (2 if BRME else 0) + (1 if CENTRE or not BRME else 0) + (1 if BSR else 0)
    share, shares, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    columns = tl.program_id(2) * BD + tl.arange(0, BD)
    here = columns < d
    lane = tl.arange(0, 2 * MP)
    begin, end = share_of(starts, pairs, head, share, shares, MP)
    g_mean = tl.zeros((2 * MP, BD), ACC)
    g_raw = tl.zeros((2 * MP, BD), ACC)
    g_reward = tl.zeros((2 * MP, BD), ACC)
    g_sum = tl.zeros((2 * MP, BD), ACC)
    for start in tl.range(begin, end, MP, num_stages=STAGES):
        _, _, row, inside = places(rows, order, start, end, pairs, MP)
        wide = read_rows(features, row_stride, row, inside, columns, d).to(ACC)
        at = coefficients + 2 * start + lane
        if BRME:
            g_mean += tl.load(at, mask=inside, other=0.0)[:, None] * wide
            g_raw += tl.load(at + 2 * tl.cast(pairs, tl.int64), mask=inside, other=0.0)[:, None] * wide
            at += 4 * tl.cast(pairs, tl.int64)
        if CENTRE or not BRME:
            g_reward += tl.load(at, mask=inside, other=0.0)[:, None] * wide
        if BSR:
            g_sum += wide
    out = partials + (head.to(tl.int64) * shares + share) * (G * d) + columns
    if BRME:
        tl.store(out, tl.sum(g_mean, axis=0), mask=here)
        tl.store(out + d, tl.sum(g_raw, axis=0), mask=here)
        out += 2 * d
    if CENTRE or not BRME:
        tl.store(out, tl.sum(g_reward, axis=0), mask=here)
        out += d
    if BSR:
        tl.store(out, tl.sum(g_sum, axis=0), mask=here)
