"""Triton device code of `preference_step`: pairs to partial gradients in one read, and the sum of the partials.

A program holds whole rows in registers: M = 2 MP of them, DP = D padded to a power of two. Row 2j of a block is pair
j's chosen response and row 2j + 1 the rejected one, so that one `tl.split` separates them. G directions of the gradient
are vectors [DP] in registers; no program holds [2K, D]. The rules of ensemble_reward/triton_math.py apply: features are
cast to ACC (fp32, or fp64 for fp64 features) before any arithmetic, and every masked load has an `other`.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from ..ensemble_reward.triton_math import noise, scalar, softplus, vector

# the 8 numbers of a program's line in `sums`: sums over its pairs or rows
LOSS = tl.constexpr(0)
REWARD = tl.constexpr(1)
SQUARE = tl.constexpr(2)
STD = tl.constexpr(3)
CORRECT = tl.constexpr(4)
MEAN_BIAS = tl.constexpr(5)
RAW_BIAS = tl.constexpr(6)
SHARED_BIAS = tl.constexpr(7)
SUMS = tl.constexpr(8)


@triton.jit
def share_of(starts, pairs, head, share, shares, MP: tl.constexpr):
    """begin, end: the share's positions among the pairs of `head`, or among all pairs without `starts`."""
    low, high = tl.cast(0, tl.int64), tl.cast(pairs, tl.int64)
    if starts is not None:
        low, high = tl.load(starts + head), tl.load(starts + head + 1)
    each = tl.cdiv(tl.cdiv(high - low, shares), MP) * MP
    begin = low + share * each
    return begin, tl.minimum(begin + each, high)


@triton.jit
def places(rows, order, start, end, pairs, MP: tl.constexpr):
    """[2 MP] pair, row of the batch, row of the features, and whether it exists."""
    lane = tl.arange(0, 2 * MP)
    position = tl.cast(start, tl.int64) + lane // 2
    rejected = (lane % 2) * tl.cast(pairs, tl.int64)
    inside = position < end
    pair = position
    if order is not None:
        pair = tl.load(order + position, mask=inside, other=0)
    row = pair + rejected
    if rows is not None:
        row = tl.load(rows + position + rejected, mask=inside, other=0)
    return pair, pair + rejected, row, inside


@triton.jit
def read_rows(features, row_stride, row, inside, columns, d):
    """[2 MP, columns] of the features, in their own dtype; zeros outside."""
    at = features + (row * row_stride)[:, None] + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < d)[None, :], other=0.0)


@triton.jit
def mean_bias(bias, K: tl.constexpr, KP: tl.constexpr, ACC: tl.constexpr):
    heads = tl.arange(0, KP)
    return tl.sum(vector(bias, heads, heads < K, 0.0, ACC), axis=0) / K


@triton.jit
def add_rows(coefficient, x):
    """[DP]: the sum of the rows of x [M, DP], each times its coefficient [M]."""
    return tl.sum(coefficient[:, None] * x, axis=0)


@triton.jit
def added(line, which: tl.constexpr, values):
    """line [8] with the sum of `values` added to its number `which`."""
    return line + tl.where(tl.arange(0, SUMS) == which, tl.sum(values, axis=0), 0.0)


@triton.jit
def differentiate(
    line, mean, raw, reward, pair, n, inside, p_hat, margin, seed, start, end, pairs, head, alpha, centre, std_floor,
    K: tl.constexpr, BRME: tl.constexpr, CENTRE: tl.constexpr, BSR: tl.constexpr, MP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The losses of a block of pairs from its products [2 MP]: the coefficients of eq. 8's mean and raw std and of the
    direction that all heads share, [2 MP] each, and `line` with the block's sums added. What is not trained is 0.
    """
    sign = tl.where(tl.arange(0, 2 * MP) % 2 == 0, 1.0, -1.0).to(ACC)
    per_pair = 1.0 / tl.full((1,), pairs, ACC)
    c_mean, c_raw, c_shared = tl.zeros_like(sign), tl.zeros_like(sign), tl.zeros_like(sign)
    if BRME:
        std = softplus(raw) + scalar(std_floor, ACC)
        p = tl.load(p_hat + pair, mask=inside, other=0.5).to(ACC)
        residual = mean - sign * scalar(alpha, ACC) * (p - 0.5)
        to_std = std
        if seed is not None:
            own = tl.zeros((1,), tl.int32) + head
            a = tl.reshape(noise(seed, n, own, K, ACC), (2 * MP,))
            residual += std * a
            to_std = residual * a
            line = added(line, LOSS, tl.where(inside, residual * residual, 0.0))
        else:
            line = added(line, LOSS, tl.where(inside, residual * residual + std * std, 0.0))
        c_mean = tl.where(inside, 2.0 * per_pair * residual, 0.0)
        c_raw = tl.where(inside, 2.0 * per_pair * to_std / (1.0 + tl.exp(-raw)), 0.0)
        line = added(line, MEAN_BIAS, c_mean)
        line = added(line, RAW_BIAS, c_raw)
        line = added(line, STD, tl.where(inside, std, 0.0))
        judged = mean
    if CENTRE or BSR or not BRME:
        chosen, rejected = tl.split(tl.reshape(reward, (MP, 2)))
        exists, _ = tl.split(tl.reshape(inside.to(ACC), (MP, 2)))
        both = chosen + rejected
        line = added(line, REWARD, tl.where(exists != 0.0, both, 0.0))
        line = added(line, SQUARE, tl.where(exists != 0.0, both * both, 0.0))
        to_chosen = tl.zeros_like(chosen)
        to_rejected = tl.zeros_like(chosen)
        if CENTRE:
            to_chosen += 2.0 * scalar(centre, ACC) * per_pair * both
            to_rejected += to_chosen
        if not BRME:
            behind = rejected - chosen
            if margin is not None:
                position = start + tl.arange(0, MP)
                behind += tl.load(margin + position, mask=position < end, other=0.0).to(ACC)
            line = added(line, LOSS, tl.where(exists != 0.0, softplus(behind), 0.0))
            # as in torch, softplus is the identity above 20, so its slope is 1 there
            slope = per_pair * tl.where(behind > 20.0, 1.0, 1.0 / (1.0 + tl.exp(-behind)))
            to_chosen -= slope
            to_rejected += slope
            judged = reward
        if CENTRE or not BRME:
            c_shared = tl.where(inside, tl.reshape(tl.join(to_chosen, to_rejected), (2 * MP,)), 0.0)
            line = added(line, SHARED_BIAS, c_shared)
    first, second = tl.split(tl.reshape(tl.where(inside, judged, 0.0), (MP, 2)))
    return c_mean, c_raw, c_shared, added(line, CORRECT, (first > second).to(ACC))


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["bias", "rows", "p_hat", "margin", "seed"])
def step_kernel(
    features, row_stride, weight, reward_weight, bias, rows, order, starts, p_hat, margin, seed, partials, sums,
    pairs, d, alpha: tl.float64, centre: tl.float64, std_floor: tl.float64,
    K: tl.constexpr, KP: tl.constexpr, BRME: tl.constexpr, CENTRE: tl.constexpr, BSR: tl.constexpr,
    MP: tl.constexpr, DP: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (s, h): the s-th share of head h's pairs (of all pairs for Bradley-Terry, h = 0).

    `order` [P] int64 are the pairs sorted by head, `starts` [K + 1] the index of each head's first; None for
    Bradley-Terry. `rows` [2P] are in the same order, so that a block's features wait for one index and not for two.
    partials [heads, shares, G, D] ACC = sums of coefficient * x, one for each direction: eq. 8's mean and raw std; then
    the one that all heads' means share (Bradley-Terry, centring); then, for batch-sum regularisation, the plain sum of
    x, whose coefficient is known only after all rewards.
    """
    G: tl.constexpr = (2 if BRME else 0) + (1 if CENTRE or not BRME else 0) + (1 if BSR else 0)
    REWARDED: tl.constexpr = CENTRE or BSR or not BRME
    share, shares, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    columns = tl.arange(0, DP)
    here = columns < d
    if BRME:
        w_mean = vector(weight + head.to(tl.int64) * d, columns, here, 0.0, ACC)
        w_raw = vector(weight + (head.to(tl.int64) + K) * d, columns, here, 0.0, ACC)
        b_mean, b_raw = tl.load(bias + head).to(ACC), tl.load(bias + K + head).to(ACC)
        g_mean = tl.zeros((DP,), ACC)
        g_raw = tl.zeros((DP,), ACC)
    if REWARDED:
        w_reward = vector(reward_weight, columns, here, 0.0, ACC)
        b_reward = mean_bias(bias, K, KP, ACC)
        g_reward = tl.zeros((DP,), ACC)
        g_sum = tl.zeros((DP,), ACC)
    begin, end = share_of(starts, pairs, head, share, shares, MP)
    line = tl.zeros((SUMS,), ACC)
    for start in tl.range(begin, end, MP, num_stages=STAGES):
        pair, n, row, inside = places(rows, order, start, end, pairs, MP)
        wide = read_rows(features, row_stride, row, inside, columns, d).to(ACC)
        mean, raw, reward = tl.zeros((2 * MP,), ACC), tl.zeros((2 * MP,), ACC), tl.zeros((2 * MP,), ACC)
        if BRME:
            mean = tl.sum(wide * w_mean[None, :], axis=1) + b_mean
            raw = tl.sum(wide * w_raw[None, :], axis=1) + b_raw
        if REWARDED:
            reward = tl.sum(wide * w_reward[None, :], axis=1) + b_reward
        c_mean, c_raw, c_shared, line = differentiate(
            line=line, mean=mean, raw=raw, reward=reward, pair=pair, n=n, inside=inside, p_hat=p_hat, margin=margin,
            seed=seed, start=start, end=end, pairs=pairs, head=head, alpha=alpha, centre=centre, std_floor=std_floor,
            K=K, BRME=BRME, CENTRE=CENTRE, BSR=BSR, MP=MP, ACC=ACC,
        )  # fmt: skip
        if BRME:
            g_mean += add_rows(c_mean, wide)
            g_raw += add_rows(c_raw, wide)
        if CENTRE or not BRME:
            g_reward += add_rows(c_shared, wide)
        if BSR:
            g_sum += tl.sum(wide, axis=0)

    program = head.to(tl.int64) * shares + share
    out = partials + program * (G * d) + columns
    if BRME:
        tl.store(out, g_mean, mask=here)
        tl.store(out + d, g_raw, mask=here)
        out += 2 * d
    if CENTRE or not BRME:
        tl.store(out, g_reward, mask=here)
        out += d
    if BSR:
        tl.store(out, g_sum, mask=here)
    tl.store(sums + program * SUMS + tl.arange(0, SUMS), line)


@triton.jit
def add_lines(sums, first, count, which: tl.constexpr, SB: tl.constexpr, ACC: tl.constexpr):
    """The sum of number `which` over `count` programs from `first` on, in a fixed order."""
    lane = tl.arange(0, SB)
    total = tl.zeros((SB,), ACC)
    for start in range(0, count, SB):
        line = tl.cast(first, tl.int64) + start + lane
        total += tl.load(sums + line * SUMS + which, mask=start + lane < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def add_partials(
    partials, first, count, which: tl.constexpr, G: tl.constexpr, columns, d, SB: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[BD]: the sum of direction `which` over `count` programs from `first` on, in a fixed order, SB at a time."""
    lane = tl.arange(0, SB)
    total = tl.zeros((SB, BD), ACC)
    for start in tl.range(0, count, SB, num_stages=STAGES):
        line = tl.cast(first, tl.int64) + start + lane
        at = partials + ((line * G + which) * d)[:, None] + columns[None, :]
        total += tl.load(at, mask=(start + lane < count)[:, None] & (columns < d)[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["pairs", "shares"])
def finish_kernel(
    partials, sums, dweight, dbias, loss, accuracy, std, pairs, shares, d, centre: tl.float64, bsr: tl.float64,
    K: tl.constexpr, BRME: tl.constexpr, CENTRE: tl.constexpr, BSR: tl.constexpr,
    SB: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (c, h): columns c BD .. of head h's two rows of dweight (of every head's for Bradley-Terry, h = 0).

    The programs of column block 0 also write dbias, and the first of them the loss, the accuracy and the std.
    """
    G: tl.constexpr = (2 if BRME else 0) + (1 if CENTRE or not BRME else 0) + (1 if BSR else 0)
    block, head = tl.program_id(0), tl.program_id(1)
    programs = shares * tl.num_programs(1)
    columns = block * BD + tl.arange(0, BD)
    here = columns < d
    count = tl.sum(tl.full((1,), pairs, ACC), axis=0)
    weight = tl.sum(tl.full((1,), bsr, ACC), axis=0)
    rewards = add_lines(sums, 0, programs, REWARD, SB, ACC)
    mean = tl.zeros((BD,), ACC)
    if CENTRE or not BRME:
        mean += add_partials(
            partials=partials, first=0, count=programs, which=2 if BRME else 0, G=G, columns=columns, d=d, SB=SB, BD=BD,
            STAGES=STAGES, ACC=ACC,
        )  # fmt: skip
    if BSR:
        # the derivative of bsr / (4P) S^2 by each reward is bsr / (2P) S, so it multiplies the sum of the rows
        slope = weight / (2.0 * count) * rewards
        mean += slope * add_partials(
            partials=partials, first=0, count=programs, which=G - 1, G=G, columns=columns, d=d, SB=SB, BD=BD,
            STAGES=STAGES, ACC=ACC,
        )  # fmt: skip
    mean /= K
    raw = tl.zeros((BD,), ACC)
    if BRME:
        mean += add_partials(
            partials=partials, first=head * shares, count=shares, which=0, G=G, columns=columns, d=d, SB=SB, BD=BD,
            STAGES=STAGES, ACC=ACC,
        )  # fmt: skip
        raw += add_partials(
            partials=partials, first=head * shares, count=shares, which=1, G=G, columns=columns, d=d, SB=SB, BD=BD,
            STAGES=STAGES, ACC=ACC,
        )  # fmt: skip
    for j in range(1 if BRME else K):
        to = dweight + (head + j).to(tl.int64) * d + columns
        tl.store(to, mean.to(dweight.dtype.element_ty), mask=here)
        tl.store(to + K * d, raw.to(dweight.dtype.element_ty), mask=here)
    if block == 0:
        shared = add_lines(sums, 0, programs, SHARED_BIAS, SB, ACC)
        if BSR:
            shared += weight * rewards
        shared /= K
        own_raw = tl.zeros_like(shared)
        if BRME:
            shared += add_lines(sums, head * shares, shares, MEAN_BIAS, SB, ACC)
            own_raw += add_lines(sums, head * shares, shares, RAW_BIAS, SB, ACC)
        for j in range(1 if BRME else K):
            tl.store(dbias + head + j, shared.to(dbias.dtype.element_ty))
            tl.store(dbias + K + head + j, own_raw.to(dbias.dtype.element_ty))
        if head == 0:
            value = add_lines(sums, 0, programs, LOSS, SB, ACC) / count
            if CENTRE:
                eta = tl.sum(tl.full((1,), centre, ACC), axis=0)
                value += eta * add_lines(sums, 0, programs, SQUARE, SB, ACC) / count
            if BSR:
                value += weight / (4.0 * count) * rewards * rewards
            tl.store(loss, value)
            tl.store(accuracy, add_lines(sums, 0, programs, CORRECT, SB, ACC) / count)
            tl.store(std, add_lines(sums, 0, programs, STD, SB, ACC) / (2.0 * count))
