"""Triton kernels of `advantages`: one program per sequence, then, for whitening, one per chunk of a sequence.

The recurrence is affine. The step before t receives C_t = gamma V_t + gamma lam A_t:

    C_t = decay C_next + decay r_t + (gamma - decay) V_t  at a step, else C_t = hole C_next         decay = gamma lam
    returns_t = r_t + C_next        A_t = returns_t - V_t

so one reversed associative scan of the pairs (factor, term) gives every C, and a gather gives each lane the C of its
right neighbour. A program takes BLOCK tokens at a time from the right and carries C over. ACC is fp32, or fp64 if an
input is.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from ..triton_arrivals import arrive, stored


@triton.jit
def after(factor, term, next_factor, next_term):
    """The composition of two affine maps: x -> factor x + term, then x -> next_factor x + next_term."""
    return factor * next_factor, next_factor * term + next_term


@triton.jit
def number(value, ACC: tl.constexpr):
    """A kernel's fp64 argument (a Python float under the interpreter) as [1] of ACC."""
    return tl.full((1,), value, ACC)


@triton.jit
def kl_estimate(d, clip, ESTIMATOR: tl.constexpr):
    """The KL estimate of d = logprob - ref_logprob, clipped; NaN stays."""
    kl = d
    if ESTIMATOR == "k2":
        kl = d * d * 0.5
    elif ESTIMATOR == "abs":
        kl = tl.abs(d)
    elif ESTIMATOR == "k3":
        # e^x - 1 - x, x = -d, cancels near 0: there its Taylor series, to x^10 exact in fp64 where |x| < 1 / 8
        x = -d
        series = tl.full(x.shape, 1.0, x.dtype)
        for i in tl.static_range(10, 2, -1):
            series = 1.0 + x * series * (1.0 / i)
        small = 0.5 * x * x * series
        # beyond 50, e^x alone is the result, even in fp64; the minimum avoids inf - inf
        large = (tl.exp(x) - 1.0) - tl.minimum(x, 50.0)
        kl = tl.where(tl.abs(x) < 0.125, small, large)
    return tl.where(kl > clip, clip, tl.where(kl < -clip, -clip, kl))


@triton.jit
def shaped(
    score, score_stride, logprob, logprob_stride, ref_logprob, ref_stride, value, value_stride, mask, mask_stride,
    kl_coef, kl_clip, row, t, score_step, length,
    ESTIMATOR: tl.constexpr, PER_TOKEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """For tokens t: reward, value (0 outside steps), KL (0 at masked tokens), whether unmasked, whether a step."""
    token = tl.load(mask + row * mask_stride + t, mask=t < length, other=0) != 0
    step = token | (t == score_step)
    if PER_TOKEN:
        reward = tl.load(score + row * score_stride + t, mask=step, other=0.0).to(ACC)
    else:
        reward = tl.where(t == score_step, tl.load(score + row * score_stride).to(ACC), 0.0)
    kl = tl.zeros(t.shape, ACC)
    if logprob is not None:
        x = tl.load(logprob + row * logprob_stride + t, mask=token, other=0.0).to(ACC)
        y = tl.load(ref_logprob + row * ref_stride + t, mask=token, other=0.0).to(ACC)
        kl = kl_estimate(x - y, kl_clip, ESTIMATOR)
        reward -= kl_coef * kl
    v = tl.zeros(t.shape, ACC)
    if value is not None:
        v = tl.load(value + row * value_stride + t, mask=step, other=0.0).to(ACC)
    return reward, v, kl, token, step


@triton.jit
def last_token(mask, mask_stride, row, length, BLOCK: tl.constexpr):
    """The last unmasked token of a sequence; -1 if it has none."""
    last = tl.full((BLOCK,), -1, tl.int32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        token = tl.load(mask + row * mask_stride + t, mask=t < length, other=0) != 0
        last = tl.maximum(last, tl.where(token, t, -1))
    return tl.max(last, axis=0)


@triton.jit
def total(partials, stats, batch, DDOF: tl.constexpr, SWEEP: tl.constexpr):
    """stats [6] from partials [5, batch] in a fixed order, in fp64: tokens, sequences, dropped, mean, std, KL."""
    lane = tl.arange(0, SWEEP)
    tokens = tl.zeros((SWEEP,), tl.float64)
    sequences = tl.zeros((SWEEP,), tl.float64)
    dropped = tl.zeros((SWEEP,), tl.float64)
    sums = tl.zeros((SWEEP,), tl.float64)
    kl = tl.zeros((SWEEP,), tl.float64)
    for start in range(0, batch, SWEEP):
        at = partials + start + lane
        inside = start + lane < batch
        n = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        mean = tl.load(at + batch, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        kl += tl.load(at + 3 * batch, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        dropped += tl.load(at + 4 * batch, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        tokens += n
        sequences += tl.where(n > 0.0, 1.0, 0.0)
        sums += n * mean
    count = tl.sum(tokens, axis=0)
    some = tl.maximum(count, 1.0)
    average = tl.sum(sums, axis=0) / some
    squares = tl.zeros((SWEEP,), tl.float64)
    for start in range(0, batch, SWEEP):
        at = partials + start + lane
        inside = start + lane < batch
        n = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        mean = tl.load(at + batch, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        squares += tl.load(at + 2 * batch, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        squares += n * (mean - average) * (mean - average)
    variance = tl.sum(squares, axis=0) / tl.maximum(count - DDOF, 1.0)
    tl.store(stats, count)
    tl.store(stats + 1, tl.sum(sequences, axis=0))
    tl.store(stats + 2, tl.sum(dropped, axis=0))
    tl.store(stats + 3, average)
    tl.store(stats + 4, tl.sqrt(variance))
    tl.store(stats + 5, tl.sum(kl, axis=0) / some)


_ANY_NUMBER = ["score_stride", "logprob_stride", "ref_stride", "value_stride", "mask_stride", "batch", "length"]
_ANY_ADDRESS = ["score", "logprob", "ref_logprob", "value", "mask"]  # views, whose rows start anywhere in any case


@triton.jit(do_not_specialize=_ANY_NUMBER, do_not_specialize_on_alignment=_ANY_ADDRESS)
def advantage_kernel(
    score, score_stride, logprob, logprob_stride, ref_logprob, ref_stride, value, value_stride, mask, mask_stride,
    advantage, returns, reward, dropped, stats, partials, counter, batch, length,
    decay: tl.float64, value_share: tl.float64, hole: tl.float64, kl_coef: tl.float64, kl_clip: tl.float64,
    ESTIMATOR: tl.constexpr, PER_TOKEN: tl.constexpr, AFTER: tl.constexpr, DDOF: tl.constexpr,
    BLOCK: tl.constexpr, SWEEP: tl.constexpr, ACC: tl.constexpr, STORES_DONE: tl.constexpr,
):  # fmt: skip
    """Program b handles sequence b and its share of the statistics: count, mean, squares about the mean, KL, dropped.
    The last program to arrive adds them up over the batch.

    advantage (not yet whitened), returns, reward [B, T] and stats [6], all ACC; dropped [B] as bytes. partials [5, B]
    ACC is scratch; counter [1] int32 is 0 before and after, so a CUDA graph replays it.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    last = last_token(mask, mask_stride, row, length, BLOCK)
    score_step = last
    if AFTER:
        score_step = tl.where((last >= 0) & (last + 1 < length), last + 1, last)
    coef = number(kl_coef, ACC)
    clip = number(kl_clip, ACC)
    share = number(value_share, ACC)
    at_step = number(decay, ACC)
    at_hole = number(hole, ACC)

    carry = tl.full((), 0.0, ACC)
    tokens = tl.full((), 0.0, ACC)
    mean = tl.full((), 0.0, ACC)
    squares = tl.full((), 0.0, ACC)
    kl_sum = tl.full((), 0.0, ACC)
    bad = tl.full((), 0, tl.int32)
    out = row * length
    chunks = tl.cdiv(length, BLOCK)
    for i in range(chunks):
        t = (chunks - 1 - i) * BLOCK + lane
        r, v, kl, token, step = shaped(
            score=score, score_stride=score_stride, logprob=logprob, logprob_stride=logprob_stride,
            ref_logprob=ref_logprob, ref_stride=ref_stride, value=value, value_stride=value_stride, mask=mask,
            mask_stride=mask_stride, kl_coef=coef, kl_clip=clip, row=row, t=t, score_step=score_step, length=length,
            ESTIMATOR=ESTIMATOR, PER_TOKEN=PER_TOKEN, ACC=ACC,
        )  # fmt: skip
        factor = tl.where(step, at_step, at_hole)
        term = tl.where(step, at_step * r + share * v, 0.0)
        factor, term = tl.associative_scan((factor, term), 0, after, reverse=True)
        passed = factor * carry + term
        right = tl.gather(passed, tl.minimum(lane + 1, BLOCK - 1), 0)
        received = tl.where(lane == BLOCK - 1, carry, right)
        carry = tl.sum(tl.where(lane == 0, passed, 0.0), axis=0)

        target = r + received
        a = tl.where(token, target - v, 0.0)
        tl.store(reward + out + t, r, mask=t < length)
        tl.store(returns + out + t, tl.where(step, target, 0.0), mask=t < length)
        tl.store(advantage + out + t, a, mask=t < length)

        here = tl.sum(token.to(ACC), axis=0)
        here_mean = tl.sum(a, axis=0) / tl.maximum(here, 1.0)
        off = tl.where(token, a - here_mean, 0.0)
        both = tl.maximum(tokens + here, 1.0)
        apart = here_mean - mean
        squares += tl.sum(off * off, axis=0) + apart * apart * (tokens * here / both)
        mean += apart * (here / both)
        tokens += here
        kl_sum += tl.sum(kl, axis=0)
        bad += tl.sum((token & ~(tl.abs(a) < float("inf"))).to(tl.int32), axis=0)

    if bad > 0:
        stored(STORES_DONE)  # this thread overwrites values that other threads stored
        for start in range(0, length, BLOCK):
            t = start + lane
            nothing = tl.zeros((BLOCK,), ACC)
            tl.store(reward + out + t, nothing, mask=t < length)
            tl.store(returns + out + t, nothing, mask=t < length)
            tl.store(advantage + out + t, nothing, mask=t < length)
        tokens *= 0.0
        mean = tl.full((), 0.0, ACC)
        squares = tl.full((), 0.0, ACC)
        kl_sum = tl.full((), 0.0, ACC)
    tl.store(dropped + row, (bad > 0).to(tl.int8))
    tl.store(partials + row, tokens)
    tl.store(partials + batch + row, mean)
    tl.store(partials + 2 * batch + row, squares)
    tl.store(partials + 3 * batch + row, kl_sum)
    tl.store(partials + 4 * batch + row, (bad > 0).to(ACC))

    if arrive(counter, STORES_DONE) == batch - 1:
        total(partials, stats, batch, DDOF, SWEEP)
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["mask_stride", "length"], do_not_specialize_on_alignment=["mask"])
def whiten_kernel(
    advantage, mask, mask_stride, dropped, stats, length, eps: tl.float64,
    WHITEN: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (b, c) whitens chunk c of sequence b in place, where it is unmasked and not dropped."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    whole = length * (1 - tl.load(dropped + row).to(tl.int32))  # 0 of a dropped sequence's tokens
    token = tl.load(mask + row * mask_stride + t, mask=t < whole, other=0) != 0
    mean = tl.load(stats + 3)
    std = tl.load(stats + 4)
    at = advantage + row * length + t
    a = tl.load(at, mask=token, other=0.0) - mean
    if WHITEN == "sample":
        a *= 1.0 / tl.sqrt(std * std + number(eps, ACC))
    elif WHITEN == "population":
        a *= 1.0 / tl.sqrt(tl.maximum(std * std, number(eps, ACC)))
    tl.store(at, a, mask=token)
