"""Triton device code of the trust region: what the product's pass over the features also sums, the distance made of the
sums, its price, and the price's gradient.

With f = x rstd g the features (g the norm's weight), c = rms mean, t = x g - c and delta = rms - 1 / rstd,

    f - mean = rstd (t + delta mean)

so that one pass, which does not know rstd yet, can sum t (and not x g, in which a large mean would cancel):

    D2 = rstd^2 (sum p t^2 + 2 delta sum p mean t + delta^2 sum p mean^2) + sum_r w_r (v_r . (f - mean))^2
    v_r . (f - mean) = rstd (v_r . t + delta v_r . mean)

Without a norm rstd = 1, c = mean and delta = 0. RN: R directions padded to a power of two, at least 16.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_math import halves, operand, scalar, vector


@triton.jit
def direction_tile(directions, columns, d, R: tl.constexpr, RN: tl.constexpr, ACC: tl.constexpr):
    """[BD, RN] the directions' `columns` in ACC; 0 in padding. evict_last, as the weight."""
    direction = tl.arange(0, RN)
    at = directions + (direction.to(tl.int64) * d)[None, :] + columns[:, None]
    inside = (columns < d)[:, None] & (direction < R)[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_last").to(ACC)


@triton.jit
def add_lengths(
    x, norm_weight, centre, precision, size, columns, d, lengths, crosses, spread, ACC: tl.constexpr
):  # fmt: skip
    """Add a tile's sum p t^2 to `lengths` [M] and, with a norm, sum p mean t to `crosses` [M] and sum p mean^2 to
    `spread` [1]; returns t [M, BD] too. size: rms, a number of ACC.
    """
    mean = vector(centre, columns, columns < d, 0.0, ACC)
    p = vector(precision, columns, columns < d, 0.0, ACC)
    t = x.to(ACC)
    if norm_weight is not None:
        t = t * vector(norm_weight, columns, columns < d, 0.0, ACC)[None, :] - (mean * size)[None, :]
        pulled = p * mean
        crosses += tl.sum(t * pulled[None, :], axis=1)
        spread += tl.sum(pulled * mean, axis=0)
    else:
        t -= mean[None, :]
    lengths += tl.sum(t * t * p[None, :], axis=1)
    return t, lengths, crosses, spread


@triton.jit
def add_projections(
    x, t, norm_weight, centre, directions, columns, d, along, pull,
    R: tl.constexpr, RN: tl.constexpr, ACC: tl.constexpr,
    HALVES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add a tile's v_r . t to `along` [M, RN] and v_r . mean to `pull` [RN].

    HALVES: x is bf16 and goes to the matrix units as it is, with g v_r in two halves: v_r . (x g), from which the
    caller subtracts v_r . c. That is exact to 2^-17 of each product, where x itself is rounded to 2^-8.
    """
    v = direction_tile(directions, columns, d, R, RN, ACC)
    mean = vector(centre, columns, columns < d, 0.0, ACC)
    pull += tl.sum(v * mean[:, None], axis=0)
    if HALVES:
        if norm_weight is not None:
            v *= vector(norm_weight, columns, columns < d, 0.0, ACC)[:, None]
        hi, lo = halves(v, UPCAST)
        along = tl.dot(operand(x, UPCAST), lo, along)
        along = tl.dot(operand(x, UPCAST), hi, along)
    else:
        along = tl.dot(t, v, along, input_precision=PRECISION, out_dtype=ACC)
    return along, pull


@triton.jit
def region_parts(
    lengths, crosses, spread, along, pull, rstd, norm_weight, weights, rms,
    R: tl.constexpr, RN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[M] D2; [M] mean' P (f - mean), 0 without a norm, where nothing needs it; [M, RN] v_r . (f - mean)."""
    squared = lengths
    towards = tl.zeros_like(lengths)
    if norm_weight is not None:
        delta = scalar(tl.load(rms), ACC) - 1.0 / rstd
        squared = rstd * rstd * (lengths + delta * (2.0 * crosses + delta * spread))
        towards = rstd * (crosses + delta * spread)
        along = rstd[:, None] * (along + delta[:, None] * pull[None, :])
    if R > 0:
        direction = tl.arange(0, RN)
        weighted = along * vector(weights, direction, direction < R, 0.0, ACC)[None, :]
        squared += tl.sum(weighted * along, axis=1)
        if norm_weight is not None:
            towards += tl.sum(weighted * pull[None, :], axis=1)
    return squared, towards, along


@triton.jit
def root(squared):
    """The distance: 0 for D2 < 0, which weights below 0 can give; NaN stays NaN."""
    return tl.sqrt(tl.where(squared < 0.0, 0.0, squared))


@triton.jit
def priced(distance, unit, trust, start, POWER: tl.constexpr, ACC: tl.constexpr):
    """[M] what the reward loses: trust unit max(distance - start, 0)^POWER."""
    beyond = distance - scalar(start, ACC)
    beyond = tl.where(beyond < 0.0, 0.0, beyond)
    lost = scalar(trust, ACC) * tl.load(unit).to(ACC) * beyond
    for _ in tl.static_range(POWER - 1):
        lost *= beyond
    return lost


@triton.jit
def price_slope(distance, unit, trust, start, POWER: tl.constexpr, ACC: tl.constexpr):
    """[M] d price / d distance; 0 at the edge of a hinge."""
    beyond = distance - scalar(start, ACC)
    slope = tl.zeros_like(distance) + scalar(trust, ACC) * POWER * tl.load(unit).to(ACC)
    for _ in tl.static_range(POWER - 1):
        slope *= beyond
    return tl.where(beyond <= 0.0, 0.0, slope)


@triton.jit
def store_region(
    kept, inside, squared, towards, along, R: tl.constexpr, RN: tl.constexpr
):  # fmt: skip
    """Keep v_r . (f - mean), D2 and mean' P (f - mean) at `kept` [M], the address of each row's R + 2 columns."""
    if R > 0:
        direction = tl.arange(0, RN)
        tl.store(kept[:, None] + direction[None, :], along, mask=inside[:, None] & (direction < R)[None, :])
    tl.store(kept + R, squared, mask=inside)
    tl.store(kept + R + 1, towards, mask=inside)


@triton.jit
def _share_planes(shares, SPLITS: tl.constexpr, R: tl.constexpr, RN: tl.constexpr, M: tl.constexpr):
    """Where `region_shares` keeps what SPLITS parts of D give: along SPLITS [programs M, RN], pull SPLITS [programs,
    RN] (none of both if R = 0), lengths and crosses SPLITS [programs M] each, spread SPLITS [programs].
    """
    programs = tl.cast(tl.num_programs(0), tl.int64)
    padded = programs * M
    pull = shares + (SPLITS * RN * padded if R > 0 else 0)
    lengths = pull + (SPLITS * RN * programs if R > 0 else 0)
    crosses = lengths + SPLITS * padded
    return pull, lengths, crosses, crosses + SPLITS * padded, programs, padded


@triton.jit
def keep_region_share(
    shares, split, n, lengths, crosses, spread, along, pull, norm_weight,
    SPLITS: tl.constexpr, R: tl.constexpr, RN: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Store this part's sums."""
    direction, block = tl.arange(0, RN), tl.program_id(0)
    pull_at, lengths_at, crosses_at, spread_at, programs, padded = _share_planes(shares, SPLITS, R, RN, M)
    at = split * padded + n
    tl.store(lengths_at + at, lengths)
    if R > 0:
        tl.store(shares + (at * RN)[:, None] + direction[None, :], along)
    if norm_weight is not None:
        tl.store(crosses_at + at, crosses)
        tl.store(spread_at + split * programs + block + tl.arange(0, 1), spread)
        if R > 0:
            tl.store(pull_at + (split * programs + block) * RN + direction, pull)


@triton.jit
def add_region_shares(
    shares, n, norm_weight, SPLITS: tl.constexpr, R: tl.constexpr, RN: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr
):
    """The sums over all parts, added in ascending order."""
    direction, block, one = tl.arange(0, RN), tl.program_id(0), tl.arange(0, 1)
    pull_at, lengths_at, crosses_at, spread_at, programs, padded = _share_planes(shares, SPLITS, R, RN, M)
    lengths, crosses = tl.zeros((M,), ACC), tl.zeros((M,), ACC)
    spread, along, pull = tl.zeros((1,), ACC), tl.zeros((M, RN), ACC), tl.zeros((RN,), ACC)
    for s in tl.range(0, SPLITS, loop_unroll_factor=4):  # four parts' loads in flight; sixteen would spill
        at = s * padded + n
        lengths += tl.load(lengths_at + at, cache_modifier=".cg")
        if R > 0:
            along += tl.load(shares + (at * RN)[:, None] + direction[None, :], cache_modifier=".cg")
        if norm_weight is not None:
            crosses += tl.load(crosses_at + at, cache_modifier=".cg")
            spread += tl.load(spread_at + s * programs + block + one, cache_modifier=".cg")
            if R > 0:
                pull += tl.load(pull_at + (s * programs + block) * RN + direction, cache_modifier=".cg")
    return lengths, crosses, spread, along, pull
