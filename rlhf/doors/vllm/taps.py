"""Read `config.taps` of one request from the states that its forward passes leave: pure functions on tensors.

vLLM may run a request in several passes (chunked prefill), and leaves out tokens that it has cached. Kept are only the
states that a tap reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ....engine.likelihood import LanguageHead, response_logprob
from ....engine.taps import Tap, read_taps
from . import contract

Kept: TypeAlias = list[tuple[int, Tensor]]
"""(the place of its first row in the sequence, states [n, C D] of C layers, the trunk's output first)."""


class Span(NamedTuple):
    """Places in a sequence: the first state that is read, the response's first token, the end of what is read."""

    first: int
    start: int
    end: int


def span_of(ids: list[int], start: int | None, skipped: int | None, *, logprob: bool) -> Span:
    """Where to read.

    Args:
        ids: of the sequence.
        start: the response's first token; None: the model reads its last token alone.
        skipped: `config.skip_token_id`.
        logprob: whether a tap needs the state before the response, which predicts its first token.
    """
    end = len(contract.without_skipped(ids, skipped))
    start = end - 1 if start is None else min(start, end - 1)
    return Span(max(start - logprob, 0), start, end)


def inner_layers(taps: Sequence[Tap], num_layers: int) -> tuple[int, ...]:
    """The layers other than the trunk's output that taps read, in ascending order."""
    return tuple(sorted({tap.layer for tap in taps if tap.layer < num_layers}))


def keep(kept: Kept, place: int, states: Tensor, span: Span) -> None:
    """Add the states [n, C D] of one pass, whose first row is at `place` in the sequence.

    A request that vLLM interrupted begins anew: what is kept from `place` on is replaced.
    """
    kept[:] = [(at, rows) for at, rows in kept if at + len(rows) <= place]
    begin, end = max(span.first - place, 0), max(span.end - place, 0)
    if begin < min(end, len(states)):
        kept.append((place + begin, states[begin:end].clone()))  # vLLM reuses the memory


def gathered(kept: Kept, span: Span) -> Tensor | None:
    """[end - first, C D]; None if a state is missing, because vLLM had that token in its prefix cache."""
    place = span.first
    for at, rows in kept:
        if at != place:
            return None
        place += len(rows)
    return torch.cat([rows for _, rows in kept]) if kept and place == span.end else None


def read(
    taps: Sequence[Tap], layers: Sequence[int], states: Tensor, ids: Tensor, span: Span, head: LanguageHead | None
) -> Tensor:
    """The features [F] of one request.

    Args:
        taps: of the model.
        layers: `inner_layers`.
        states: [end - first, C D], C = 1 + len(layers).
        ids: [T] the token ids of the sequence.
        span: of the sequence.
        head: for the tap logprob.
    """
    output, *inner = (part[None] for part in states.chunk(1 + len(layers), dim=1))
    place = torch.arange(span.first, span.end, device=states.device)[None]
    response = place >= span.start
    logprob = None
    if head is not None:
        read_ids = ids[None, span.first : span.end].to(states.device, torch.int64)
        logprob = response_logprob(head, output, read_ids, response, place)
    last = torch.tensor([span.end - span.first - 1], device=states.device)
    return read_taps(taps, dict(zip(layers, inner, strict=True)), output, last, response, logprob)[0]
