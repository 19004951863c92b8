"""Triton kernels over a tile of logits: online statistics, and the derivative in place. One program per row."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh from exp; near 0, where that cancels, from its series (relative error below 1e-7 up to 0.3)."""
    e = tl.exp(-2.0 * tl.abs(x))
    result = (1.0 - e) / (1.0 + e)
    result = tl.where(x < 0.0, -result, result)
    if x.dtype == tl.float32:
        s = x * x
        series = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
        result = tl.where(tl.abs(x) < 0.3, series, result)
    return result


@triton.jit
def _capped(raw, inverse_temperature, softcap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """Capped, tempered logits, and the cap's derivative (1 without one)."""
    tempered = raw * tl.full((1,), inverse_temperature, ACC)
    slope = tl.full(raw.shape, 1.0, ACC)
    if SOFTCAP:
        tanh = _tanh(raw / tl.full((1,), softcap, ACC))
        tempered = tanh * tl.full((1,), softcap * inverse_temperature, ACC)
        slope = 1.0 - tanh * tanh
    return tempered, slope


@triton.jit(do_not_specialize=["column", "rows"])
def statistics_kernel(
    tile, target, state, logprob, entropy, lse, columns, column, rows,
    inverse_temperature: tl.float64, softcap: tl.float64,
    FIRST: tl.constexpr, LAST: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add a tile [rows, columns] of raw logits, from vocabulary entry `column` on, to `state` [4, rows]: greatest logit
    m, sum exp(x - m), sum exp(x - m) (x - m), the target's logit. The last tile writes the outputs instead.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < columns
    raw = tl.load(tile + row * columns + lane, mask=inside, other=0.0).to(ACC)
    x, _ = _capped(raw, inverse_temperature, softcap, SOFTCAP, ACC)
    greatest = tl.max(tl.where(inside, x, float("-inf")), axis=0)
    power = tl.where(inside, tl.exp(x - greatest), 0.0)
    total = tl.sum(power, axis=0)
    weighted = tl.sum(tl.where(inside, power * (x - greatest), 0.0), axis=0)
    wanted = tl.load(target + row) - column
    chosen = tl.sum(tl.where(lane == wanted, x, 0.0), axis=0)
    here = (wanted >= 0) & (wanted < columns)
    if FIRST:  # NaN remains if the target is not a token, which is unchecked on a GPU
        chosen = tl.where(here, chosen, float("nan"))
    else:
        old = tl.load(state + row)
        old_total = tl.load(state + rows + row)
        old_weighted = tl.load(state + 2 * rows + row)
        chosen = tl.where(here, chosen, tl.load(state + 3 * rows + row))
        new = tl.maximum(old, greatest)
        fade, old_fade = tl.exp(greatest - new), tl.exp(old - new)
        weighted = fade * (weighted + total * (greatest - new)) + old_fade * (old_weighted + old_total * (old - new))
        total = fade * total + old_fade * old_total
        greatest = new
    if LAST:
        log_total = tl.log(total)
        tl.store(logprob + row, chosen - greatest - log_total)
        tl.store(entropy + row, log_total - weighted / total)
        tl.store(lse + row, greatest + log_total)
    else:
        tl.store(state + row, greatest)
        tl.store(state + rows + row, total)
        tl.store(state + 2 * rows + row, weighted)
        tl.store(state + 3 * rows + row, chosen)


@triton.jit(do_not_specialize=["column"])
def gradient_kernel(
    tile, slope, target, entropy, lse, d_logprob, d_entropy, d_lse, columns, slope_stride, column,
    inverse_temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The loss's derivative by a tile of raw logits, in the storage dtype. `slope` is the tile's own memory: each row
    is written over the start of the tile's row. The d_ vectors are divided by the temperature already.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < columns
    raw = tl.load(tile + row * columns + lane, mask=inside, other=0.0).to(ACC)
    x, cap = _capped(raw, inverse_temperature, softcap, SOFTCAP, ACC)
    below = x - tl.load(lse + row)
    factor = tl.zeros((), ACC)
    if d_lse is not None:
        factor += tl.load(d_lse + row)
    if d_logprob is not None:
        factor -= tl.load(d_logprob + row)
    if d_entropy is not None:
        outer = tl.load(d_entropy + row)
        g = tl.exp(below) * (factor - outer * (below + tl.load(entropy + row)))
    else:
        g = tl.exp(below) * factor
    if d_logprob is not None:
        wanted = tl.load(target + row) - column
        g += tl.where(lane == wanted, tl.load(d_logprob + row), 0.0)
    g *= cap
    tl.debug_barrier()  # every thread has read its logits before any of them is overwritten
    tl.store(slope + row * slope_stride + lane, g.to(slope.dtype.element_ty), mask=inside)
