"""`linear_logprob` tile by tile: the loops that all devices share, and the execution in torch.

The outer loop is over chunks of rows, the inner loop over tiles of the vocabulary. The forward keeps four running
numbers a row, the backward the hidden gradient of a chunk of rows; no tensor has T x V elements unless the caller gives
bytes to keep numerators. torch_tiles.py and triton.py compute on a tile of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import Call, empty_numerators, without_autocast
from .contract import DERIVATIVE, Grads, Inputs, Needs, OutputGrads, Results, Saved
from .products import product
from .torch_tiles import Emit, Kept, RowTerms, TorchTiles


def run_forward(inputs: Inputs, rows: Tensor | None, keep: int, group: Any, tiles: type[Any]) -> Results:
    """Outputs through `tiles.statistics`, and what `keep` asks for (contract.py)."""
    new = inputs.hidden.new_empty
    kept, peaks, keeping = new(0), new(0), None
    if keep > 0:
        kept, peaks = empty_numerators(inputs, keep, tiles.device_kind)
        keeping = kept.shape[0]
    call = Call(inputs, rows, tiles, group, narrow=keep == DERIVATIVE, kept=keeping)
    if keep == DERIVATIVE:
        kept = new(inputs.target.numel(), call.dim)
    if rows is not None:  # of the dropped rows
        kept[call.count :].zero_()
        peaks[..., call.count :].zero_()
    found, flat = call.outputs()
    with without_autocast(inputs.hidden.device):
        for start, end in call.row_chunks():
            state = call.work("state", (4, end - start), call.accumulator)
            if keep == DERIVATIVE:
                sums = _products_with_powers(call, start, end, state)
            else:
                _statistics(call, start, end, state, kept, peaks)
            outputs = _finish(call.shard.merged(state, call.target[start:end]))
            for whole, part in zip(flat, outputs, strict=True):
                whole[start:end] = part
            if keep == DERIVATIVE:
                _finish_derivative(call, sums, state[0], outputs, start, end)
                kept[start:end].copy_(call.masked_(sums, start, end))
            elif end <= call.kept:
                peaks[-1, start:end] = outputs[0]
    for whole, output in zip(flat, found, strict=True):
        call.spread(whole, output)
    logprob, entropy, lse = found
    return Results(logprob, entropy, lse, kept, peaks)


def _finish(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, lse) from the running numbers [4, rows]. The entropy of a peaked distribution is not a
    difference of large numbers, because sum exp(x - m) (x - m) is relative to the greatest logit m.
    """
    greatest, total, weighted, chosen = state
    log_total = total.log()
    return chosen - greatest - log_total, log_total - weighted / total, greatest + log_total


def _statistics(call: Call, start: int, end: int, state: Tensor, kept: Tensor, peaks: Tensor) -> None:
    """The running numbers of rows start .. end - 1 over this part of the vocabulary, and their numerators if kept."""
    hidden, target = call.hidden_chunk(start, end), call.target[start:end]
    for column, last, weight in call.blocks(call.plan.columns):
        emit = None
        if end <= call.kept:
            place = peaks[column // call.plan.columns, start:end]
            emit = Emit(kept[start:end, column:last], place, derivative=False)
        call.tiles.statistics(call.logits(hidden, weight), target, column, call.shard.first, state, emit)


def _products_with_powers(call: Call, start: int, end: int, state: Tensor) -> Tensor:
    """`_statistics`, and sum_j exp(x_j - m) x'_j weight_j [rows, D] over all j but the target; x' is the cap's slope.

    The sum is relative to the greatest logit so far, as in flash attention. The target is left out because its 16-bit
    rounding would not be small against 1 - p.
    """
    hidden, target = call.hidden_chunk(start, end), call.target[start:end]
    sums = call.work("hidden gradient", (end - start, call.dim), call.accumulator)
    fade = call.work("fade", (end - start,), call.accumulator)
    for column, last, weight in call.blocks(call.plan.columns):
        powers = call.work("slopes", (end - start, last - column), call.operand)
        emit = Emit(powers, fade, derivative=True)
        call.tiles.statistics(call.logits(hidden, weight), target, column, call.shard.first, state, emit)
        if column > 0:
            sums.mul_(fade[:, None])
        product(powers, weight, sums, column > 0, call.work)
    return sums


def _finish_derivative(
    call: Call, sums: Tensor, greatest: Tensor, outputs: tuple[Tensor, ...], start: int, end: int
) -> None:
    """d logprob / d hidden = [(1 - p_y) x'_y weight_y - sum_{j not y} p_j x'_j weight_j] / temperature, in place of the
    sum. `greatest`: the logit that this rank's sum is relative to.
    """
    inputs = call.inputs
    logprob, _, lse = outputs
    sums.mul_(((greatest - lse).exp() / -inputs.temperature)[:, None])
    factor = torch.expm1(logprob) / -inputs.temperature
    if inputs.softcap is not None:
        factor = factor * (1 - ((logprob + lse) * (inputs.temperature / inputs.softcap)).square())
    here, index = call.shard.local(call.target[start:end])
    factor = torch.where(here, factor, logprob * 0)  # a target that is not a token makes its row NaN
    chosen = call.work("chosen", sums.shape, inputs.weight.dtype)
    torch.index_select(inputs.weight, 0, index, out=chosen)
    if chosen.dtype != sums.dtype:
        chosen = call.work("chosen wide", sums.shape, sums.dtype).copy_(chosen)
    sums.addcmul_(chosen, factor[:, None])
    call.shard.add_(sums)


def run_backward(
    grads: OutputGrads,
    inputs: Inputs,
    rows: Tensor | None,
    saved: Saved,
    needs: Needs,
    group: Any,
    tiles: type[Any],
) -> Grads:
    """(grad_hidden, grad_weight, grad_bias) through `tiles.gradient`: each tile's logits again unless their numerators
    were kept, then up to two products.
    """
    if saved.keep == DERIVATIVE and grads.entropy is None and grads.lse is None and grads.logprob is not None:
        return _from_derivative(grads.logprob, inputs, rows, saved, tiles), None, None
    keeping = saved.kept.shape[0] if saved.keep > 0 and saved.kept is not None else None
    call = Call(inputs, rows, tiles, group, not (needs.weight or needs.bias), keeping)
    grad_hidden = call.new(inputs.hidden, rows is None) if needs.hidden else None
    grad_weight = call.new(inputs.weight, True) if needs.weight else None
    bias = inputs.bias
    bias_sum = bias.new_zeros(bias.shape, dtype=call.accumulator) if needs.bias and bias is not None else None
    # the temperature divides every gradient of the capped logits, so divide the outer gradients by it once
    outer = tuple(None if g is None else call.gathered(g) / inputs.temperature for g in grads)
    terms = RowTerms(call.gathered(saved.entropy), call.gathered(saved.lse), *outer)
    with without_autocast(inputs.hidden.device):
        for start, end in call.row_chunks() if any(needs) else ():
            _add_chunk(call, start, end, terms.part(start, end), saved, grad_hidden, grad_weight, bias_sum)
    return grad_hidden, grad_weight, None if bias_sum is None or bias is None else bias_sum.to(bias.dtype)


def _add_chunk(
    call: Call,
    start: int,
    end: int,
    terms: RowTerms,
    saved: Saved,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    bias_sum: Tensor | None,
) -> None:
    """Write the hidden gradient of rows start .. end - 1, and add their part of the weight's and the bias's."""
    hidden = call.hidden_chunk(start, end, clean=grad_weight is not None)
    into = _hidden_accumulator(call, grad_hidden, start, end)
    for column, last, weight in call.blocks(call.plan.columns * call.plan.tiles):
        slopes = _slopes(call, hidden, weight, (start, end), (column, last), terms, saved)
        if grad_weight is not None:
            product(slopes.T, hidden, grad_weight[column:last], start > 0, call.work)
        if bias_sum is not None:
            bias_sum[column:last] += slopes.sum(dim=0, dtype=call.accumulator)
        if into is not None:
            product(slopes, weight, into, column > 0, call.work)
    if grad_hidden is not None and into is not None:
        call.shard.add_(into)
        if into.dtype != grad_hidden.dtype or call.rows is not None:
            call.store(into, grad_hidden, start, end)


def _slopes(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    rows: tuple[int, int],
    block: tuple[int, int],
    terms: RowTerms,
    saved: Saved,
) -> Tensor:
    """The loss's derivative by the logits of a block of the vocabulary, [rows, columns] operands, tile by tile."""
    (start, end), (column, last) = rows, block
    slopes = call.work("slopes", (end - start, last - column), call.operand)
    for first, past in call.columns(column, last):
        out = slopes[:, first - column : past - column]
        source: Tensor | Kept
        if end <= call.kept:
            assert saved.kept is not None
            assert saved.peaks is not None
            peak = saved.peaks[first // call.plan.columns, start:end]
            source = Kept(saved.kept[start:end, first:past], peak, saved.peaks[-1, start:end])
        else:
            source = call.logits(hidden, weight[first - column : past - column])
        call.tiles.gradient(source, call.target[start:end], first, call.shard.first, terms, out)
    return slopes


def _hidden_accumulator(call: Call, grad_hidden: Tensor | None, start: int, end: int) -> Tensor | None:
    """The tensor that sums the rows' hidden gradient: the result if it has the accumulator's dtype, else scratch."""
    if grad_hidden is None:
        return None
    if call.rows is None and grad_hidden.dtype == call.accumulator:
        return grad_hidden.view(-1, call.dim)[start:end]
    return call.work("hidden gradient", (end - start, call.dim), call.accumulator)


def _from_derivative(
    grad_logprob: Tensor, inputs: Inputs, rows: Tensor | None, saved: Saved, tiles: type[Any]
) -> Tensor:
    """grad_hidden = the row's outer gradient times d logprob / d hidden: no product, the same on every rank."""
    call = Call(inputs, rows, tiles, None, narrow=True)
    assert saved.kept is not None
    outer, found = call.gathered(grad_logprob)[:, None], call.new(inputs.hidden, rows is None)
    for start, end in call.row_chunks():
        scaled = call.work("scaled", (end - start, call.dim), call.accumulator)
        call.store(torch.mul(saved.kept[start:end], outer[start:end], out=scaled), found, start, end)
    return found


def scored_rows(inputs: Inputs) -> Tensor | None:
    """Positions of the flattened target that are not ignored; None: all."""
    if inputs.ignore_index is None:
        return None
    rows = torch.nonzero(inputs.target.reshape(-1) != inputs.ignore_index).squeeze(1)
    return None if rows.shape[0] == inputs.target.numel() else rows


def forward(inputs: Inputs, rows: Tensor | None, keep: int = 0, group: Any = None) -> Results:
    """Outputs of target's shape, in torch."""
    return run_forward(inputs, rows, keep, group, TorchTiles)


def backward(
    grads: OutputGrads, inputs: Inputs, rows: Tensor | None, saved: Saved, needs: Needs, group: Any = None
) -> Grads:
    """Gradients of hidden, weight and bias (None if not needed) from the gradients of the three outputs."""
    return run_backward(grads, inputs, rows, saved, needs, group, TorchTiles)
