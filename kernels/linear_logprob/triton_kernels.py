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


@triton.jit
def _raw(tile, bias, row, lane, inside, columns, ACC: tl.constexpr):
    """A row of a tile of logits, with the bias. `bias` points to the tile's first column."""
    raw = tl.load(tile + row * columns + lane, mask=inside, other=0.0).to(ACC)
    if bias is not None:
        raw += tl.load(bias + lane, mask=inside, other=0.0).to(ACC)
    return raw


@triton.jit(do_not_specialize=["column", "rows"])
def statistics_kernel(
    tile, bias, target, state, powers, scale, columns, powers_stride, column, rows,
    inverse_temperature: tl.float64, softcap: tl.float64,
    FIRST: tl.constexpr, DERIVATIVE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add a tile [rows, columns] of raw logits, from vocabulary entry `column` on, to `state` [4, rows]: greatest logit
    m, sum exp(x - m), sum exp(x - m) (x - m), the target's logit. `powers` and `scale`: Emit in torch_tiles.py.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < columns
    x, cap = _capped(_raw(tile, bias, row, lane, inside, columns, ACC), inverse_temperature, softcap, SOFTCAP, ACC)
    greatest = tl.max(tl.where(inside, x, float("-inf")), axis=0)
    power = tl.where(inside, tl.exp(x - greatest), 0.0)
    total = tl.sum(power, axis=0)
    weighted = tl.sum(tl.where(inside, power * (x - greatest), 0.0), axis=0)
    wanted = tl.load(target + row) - column
    chosen = tl.sum(tl.where(lane == wanted, x, 0.0), axis=0)
    here = (wanted >= 0) & (wanted < columns)
    fade, old_fade = tl.full((), 1.0, ACC), tl.full((), 1.0, ACC)
    if FIRST:  # NaN remains if the target is in no tile
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
    tl.store(state + row, greatest)
    tl.store(state + rows + row, total)
    tl.store(state + 2 * rows + row, weighted)
    tl.store(state + 3 * rows + row, chosen)
    if powers is not None:
        power *= fade
        if DERIVATIVE:
            power = tl.where(lane == wanted, 0.0, power * cap)
            tl.store(scale + row, old_fade)
        else:
            tl.store(scale + row, greatest)
        tl.store(powers + row * powers_stride + lane, power.to(powers.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["column", "ignore_index"])
def gradient_kernel(
    source, bias, peak, logprob, slopes, target, entropy, lse, d_logprob, d_entropy, d_lse, columns, source_stride,
    slopes_stride, column, ignore_index, inverse_temperature: tl.float64, softcap: tl.float64,
    IGNORE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The loss's derivative by the logits of a tile, in the slopes' dtype; 0 in rows whose target is `ignore_index`.

    `source`: raw logits, or the numerators exp(x - peak), if `peak` is given. The d_ vectors are divided by the
    temperature already.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < columns
    token = tl.load(target + row)
    wanted = token - column
    log_sum = tl.load(lse + row)
    if peak is not None:
        kept = tl.load(source + row * source_stride + lane, mask=inside, other=0.0).to(ACC)
        positive = kept > 0.0  # else p = 0, and any finite number will do as its logarithm
        below = tl.where(positive, tl.log(tl.where(positive, kept, 1.0)), -1.0e4) + (tl.load(peak + row) - log_sum)
        below = tl.where(lane == wanted, tl.load(logprob + row), below)
        cap = tl.full((BLOCK,), 1.0, ACC)
        if SOFTCAP:
            tanh = (below + log_sum) / tl.full((1,), softcap * inverse_temperature, ACC)
            cap = 1.0 - tanh * tanh
    else:
        raw = _raw(source, bias, row, lane, inside, source_stride, ACC)
        x, cap = _capped(raw, inverse_temperature, softcap, SOFTCAP, ACC)
        below = x - log_sum
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
        g += tl.where(lane == wanted, tl.load(d_logprob + row), 0.0)
    g *= cap
    if IGNORE:  # not a product with 0: the row's hidden states may hold a NaN
        g = tl.where(token == ignore_index, 0.0, g)
    tl.store(slopes + row * slopes_stride + lane, g.to(slopes.dtype.element_ty), mask=inside)
