"""Triton device code that the forward and the backward of `ensemble_reward` share: product, heads, aggregation.

Shapes in comments: M = rows of a program, KP = heads padded to a power of two >= 8, BN = 2 KP columns (at least 16, the
least that `tl.dot` takes), BD = a block of D. Column 2k of a product is head k's mean and column 2k + 1 its raw std, so
that one `tl.split` separates them in registers. ACC is fp32, or fp64 for fp64 hidden states.

Rules of this code, each with an observed reason. Cast a bf16 value to ACC right after its load: the interpreter
computes on bf16 bit patterns, silently wrong. Give every masked load an `other`: the interpreter reads 0, a GPU
anything. Call no libdevice function: the interpreter has none. Take scalars as fp64 and round them to ACC here, so that
the fp64 path gets the exact options. Do not `return` in a constexpr `if`: the rest is compiled all the same.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)

# Arguments of few bytes that may be views at any address: a seed that is one element of a tensor, rows[1:]. Triton
# compiles a kernel again for a pointer that is not a multiple of 16, unless the kernel says that it assumes nothing.
ANY_ADDRESS = [
    "rows", "seed", "labels", "bias", "shift", "scale", "std_ref", "weights", "unit", "rms",
]  # fmt: skip


@triton.jit
def scalar(value, ACC: tl.constexpr):
    """A kernel's fp64 argument (a Python float under the interpreter) as [1] of ACC."""
    return tl.full((1,), value, ACC)


@triton.jit
def vector(pointer, index, inside, other: tl.constexpr, ACC: tl.constexpr):
    return tl.load(pointer + index, mask=inside, other=other).to(ACC)


@triton.jit
def column_rows(K: tl.constexpr, BN: tl.constexpr):
    """[BN] the row of `weight` for each column, and whether the column is real (not padding)."""
    column = tl.arange(0, BN)
    return (column % 2) * K + column // 2, column // 2 < K


@triton.jit
def positions(block, num_rows, rows, M: tl.constexpr):
    """[M] index n among the scored rows (int64), the row of `hidden` that it reads (int64), and whether it exists."""
    n = tl.cast(block, tl.int64) * M + tl.arange(0, M)
    inside = n < num_rows
    row = n
    if rows is not None:
        row = tl.load(rows + n, mask=inside, other=0)
    return n, row, inside


@triton.jit
def folded_weight(weight, norm_weight, columns, d, K: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """[BD, BN] norm_weight * weight, in ACC; 0 in padding. evict_last: every row block reads it again, from L2."""
    source, real = column_rows(K, BN)
    at = weight + (source.to(tl.int64) * d)[None, :] + columns[:, None]
    tile = tl.load(at, mask=(columns < d)[:, None] & real[None, :], other=0.0, eviction_policy="evict_last").to(ACC)
    if norm_weight is not None:
        tile *= vector(norm_weight, columns, columns < d, 0.0, ACC)[:, None]
    return tile


@triton.jit
def halves(value, UPCAST: tl.constexpr):
    """Split fp32 into two bf16: hi + lo to 2^-17. UPCAST: return them as fp32, for the interpreter."""
    hi = value.to(tl.bfloat16)
    lo = (value - hi.to(tl.float32)).to(tl.bfloat16)
    if UPCAST:
        hi, lo = hi.to(tl.float32), lo.to(tl.float32)
    return hi, lo


@triton.jit
def operand(x, UPCAST: tl.constexpr):
    """A bf16 tile for `tl.dot`; UPCAST: as fp32, because the interpreter multiplies bf16 bit patterns."""
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def softplus(x):
    """log(1 + e^x), x itself above torch's threshold of 20."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    # log1p without libdevice: log(u) e / (u - 1) undoes the rounding of 1 + e (Kahan); u == 1: e is below half an ulp
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, tl.where(x != x, x, log1p))


@triton.jit
def uniform(word, ACC: tl.constexpr):
    """(word >> 9) * 2^-23 + 2^-24 in (0, 1): exact in fp32."""
    return (word.to(tl.uint32, bitcast=True) >> 9).to(ACC) * 1.1920928955078125e-07 + 5.9604644775390625e-08


@triton.jit
def cos_turns(u, ACC: tl.constexpr):
    """cos(2 pi u) for u in (0, 1): folded without rounding to sin(x), |x| <= pi / 2, and summed as its series.

    tl.cos would take local memory and registers for large arguments, which do not occur here.
    """
    x = (tl.abs(u - 0.5) - 0.25) * 6.283185307179586
    square = x * x
    series = tl.zeros_like(x) + 1.0
    TERMS: tl.constexpr = 10 if tl.float64 == ACC else 6
    for i in tl.static_range(TERMS, 0, -1):
        series = 1.0 - square * (1.0 / ((2 * i) * (2 * i + 1))) * series
    return x * series


@triton.jit
def noise(seed, n, heads, K: tl.constexpr, ACC: tl.constexpr):
    """[M, KP] N(0, 1) of head k in row n, at counter n * K + k."""
    return noise_at(seed, n[:, None] * K + heads[None, :], ACC)


@triton.jit
def noise_at(seed, counter, ACC: tl.constexpr):
    """N(0, 1) for each counter: Box-Muller on words 0 and 1 of Philox-4x32-7."""
    w0, w1, _, _ = tl.randint4x(tl.load(seed), counter, PHILOX_ROUNDS)
    return tl.sqrt(-2.0 * tl.log(uniform(w0, ACC))) * cos_turns(uniform(w1, ACC), ACC)


@triton.jit
def split_heads(
    z, bias, shift, scale, std_floor,
    K: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[M, BN] product -> [M, KP] mean, std (both calibrated) and raw std."""
    heads = tl.arange(0, BN // 2)
    if bias is not None:
        source, real = column_rows(K, BN)
        z += vector(bias, source, real, 0.0, ACC)[None, :]
    mean, raw = tl.split(tl.reshape(z, (M, BN // 2, 2)))
    std = softplus(raw) + scalar(std_floor, ACC)
    if shift is not None:
        mean -= vector(shift, heads, heads < K, 0.0, ACC)[None, :]
    if scale is not None:
        by = vector(scale, heads, heads < K, 1.0, ACC)[None, :]
        mean, std = mean / by, std / by
    return mean, std, raw


@triton.jit
def over_heads(values, heads, K: tl.constexpr):
    """[M] sum over the real heads."""
    return tl.sum(tl.where((heads < K)[None, :], values, 0.0), axis=1)


@triton.jit
def least(values, heads, K: tl.constexpr, KP: tl.constexpr):
    """[M, KP] mask of the least value of each row, as torch.argmin: a NaN wins, a tie goes to the lowest head."""
    real = (heads < K)[None, :]
    nan = (values != values) & real
    low = tl.min(tl.where(real & (values == values), values, float("inf")), axis=1)
    has_nan = tl.max(nan.to(tl.int32), axis=1) > 0
    found = (nan & has_nan[:, None]) | ((values == low[:, None]) & real & (has_nan[:, None] == 0))
    first = tl.min(tl.where(found, heads[None, :], KP), axis=1)
    return heads[None, :] == first[:, None]


@triton.jit
def nominal_weights(
    std, std_ref, fixed_head, heads, K: tl.constexpr, KP: tl.constexpr, NOMINAL: tl.constexpr, ACC: tl.constexpr
):
    """[M, KP] weights of the nominal reward, sum_k weight_k mean_k: 1 at the head of least std, or as NOMINAL says."""
    if NOMINAL == "mean":
        weights = tl.zeros_like(std) + 1.0 / K
    elif NOMINAL == "head":
        weights = tl.zeros_like(std) + (heads == fixed_head)[None, :].to(ACC)
    elif NOMINAL == "relative_std":
        weights = least(std / vector(std_ref, heads, heads < K, 1.0, ACC)[None, :], heads, K, KP).to(ACC)
    else:
        weights = least(std, heads, K, KP).to(ACC)
    return weights


@triton.jit
def ranks(values, heads, K: tl.constexpr):
    """[M, KP] int32 rank of each head in a stable ascending sort, NaN last, as torch.sort has it."""
    rank = tl.zeros_like(values).to(tl.int32)
    nan = values != values
    for j in range(K):
        other = tl.sum(tl.where((heads == j)[None, :], values, 0.0), axis=1)[:, None]
        earlier = (heads > j)[None, :]
        ahead = (other < values) | ((other == values) & earlier) | (nan & ((other == other) | earlier))
        rank += ahead.to(tl.int32)
    return rank


@triton.jit
def order_weights(
    values, head_or_count, heads, K: tl.constexpr, KP: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr
):
    """[M, KP] weights of the aggregations that combine the sorted heads, or the heads by index, in fixed shares."""
    if KIND == "mean":
        weights = tl.zeros_like(values) + 1.0 / K
    elif KIND == "head":
        weights = tl.zeros_like(values) + (heads == head_or_count)[None, :].to(ACC)
    elif KIND == "min":
        weights = least(values, heads, K, KP).to(ACC)
    elif KIND == "max":
        weights = least(-values, heads, K, KP).to(ACC)
    elif KIND == "median":
        rank = ranks(values, heads, K)
        weights = 0.5 * (rank == (K - 1) // 2).to(ACC) + 0.5 * (rank == K // 2).to(ACC)
    else:
        tl.static_assert(KIND == "cvar", "unknown aggregation")
        weights = tl.where(ranks(values, heads, K) < head_or_count, 1.0 / tl.full((1, 1), head_or_count, ACC), 0.0)
    return weights


@triton.jit
def aggregate(
    mean, std, values, std_ref, coefficient, head_or_count, heads,
    K: tl.constexpr, KP: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr, OF_BATCH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """[M] reward before centring; OF_BATCH: without the share of the batch's worst head, which the last program adds.
    `head_or_count`: the index of `head:i` or `nominal=head:i`, or how many of the lowest heads cvar averages.
    """
    lam = scalar(coefficient, ACC)
    if KIND == "tradeoff" or KIND == "nominal":
        chosen = nominal_weights(
            std=std, std_ref=std_ref, fixed_head=head_or_count, heads=heads, K=K, KP=KP, NOMINAL=NOMINAL, ACC=ACC
        )
        reward = over_heads(tl.where(chosen != 0.0, chosen * mean, 0.0), heads, K)
        if KIND == "tradeoff":
            reward = lam * reward
            if not OF_BATCH:
                worst = tl.sum(tl.where(least(values, heads, K, KP), values, 0.0), axis=1)
                reward += (1.0 - lam) * worst
    elif KIND == "batch_worst":
        reward = tl.sum(tl.zeros_like(values), axis=1)
    elif KIND == "softmin":
        scaled = tl.where((heads < K)[None, :], -values / lam[:, None], float("-inf"))
        top = tl.max(scaled, axis=1)
        top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        reward = -lam * (tl.log(over_heads(tl.exp(scaled - top[:, None]), heads, K) / K) + top)
    elif KIND == "lcb" or KIND == "uwo":
        middle = over_heads(values, heads, K) / K
        gap = values - middle[:, None]
        spread = over_heads(gap * gap, heads, K) / K
        if KIND == "lcb":
            spread = tl.sqrt(spread)
        reward = middle - lam * spread
    else:
        weights = order_weights(values=values, head_or_count=head_or_count, heads=heads, K=K, KP=KP, KIND=KIND, ACC=ACC)
        # leave out heads of weight 0, because 0 * inf is NaN; but a NaN head makes the row NaN
        taken = (weights != 0.0) | (values != values)
        reward = over_heads(tl.where(taken, values * weights, 0.0), heads, K)
    return reward


@triton.jit
def aggregate_gradient(
    std, values, std_ref, coefficient, head_or_count, batch_head, heads,
    K: tl.constexpr, KP: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr, OF_BATCH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """[M, KP] d reward / d mean (only through the nominal head) and d reward / d value. `batch_head` [M]: with OF_BATCH
    the index of the batch's worst head, as ACC.
    """
    lam = scalar(coefficient, ACC)[:, None]
    to_mean = tl.zeros_like(values)
    to_value = tl.zeros_like(values)
    if KIND == "tradeoff" or KIND == "nominal":
        to_mean = nominal_weights(
            std=std, std_ref=std_ref, fixed_head=head_or_count, heads=heads, K=K, KP=KP, NOMINAL=NOMINAL, ACC=ACC
        )
        if KIND == "tradeoff":
            to_mean = lam * to_mean
            worst = heads[None, :] == batch_head.to(tl.int32)[:, None] if OF_BATCH else least(values, heads, K, KP)
            to_value = (1.0 - lam) * worst.to(ACC)
    elif KIND == "batch_worst":
        to_value = (heads[None, :] == batch_head.to(tl.int32)[:, None]).to(ACC)
    elif KIND == "softmin":
        scaled = tl.where((heads < K)[None, :], -values / lam, float("-inf"))
        share = tl.exp(scaled - tl.max(scaled, axis=1)[:, None])
        to_value = share / over_heads(share, heads, K)[:, None]
    elif KIND == "lcb" or KIND == "uwo":
        gap = values - (over_heads(values, heads, K) / K)[:, None]
        if KIND == "uwo":
            to_value = 1.0 / K - 2.0 * lam * gap / K
        else:
            spread = tl.sqrt(over_heads(gap * gap, heads, K) / K)[:, None]
            # the std has a kink where all heads agree; the subgradient 0 leaves them equal
            slope = tl.where(spread == 0.0, 0.0, gap / tl.where(spread == 0.0, 1.0, K * spread))
            to_value = 1.0 / K - lam * slope
    else:
        to_value = order_weights(
            values=values, head_or_count=head_or_count, heads=heads, K=K, KP=KP, KIND=KIND, ACC=ACC
        )
    return to_mean, to_value
