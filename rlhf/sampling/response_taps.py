"""The features of responses while they are sampled, one token a step, as a pass over the whole text would give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.likelihood import LanguageHead
from ...engine.taps import Tap, reads_logprob


class ResponseTaps:
    """The taps over each row's tokens so far. Rows are named by their numbers in the first step.

    Every row reads one token at every step until it is finished, so the number of steps is its number of tokens. What
    finished rows that are still fed get is not read.

    Args:
        model: a causal language model.
        count: number of rows.
        skips: ids that a tap of kind `logprob` leaves out.
    """

    def __init__(self, taps: Sequence[Tap], model: Any, count: int, skips: Sequence[int]) -> None:
        self._taps = taps
        self._sums: dict[Tap, Tensor] = {}  # of tap `mean`: [count, D] fp32
        self._steps = 0
        self._head = LanguageHead.of(model, skips) if reads_logprob(taps) else None
        self._count, self._total, self._least = torch.zeros(3, count, device=model.device)  # of log-probabilities

    @property
    def needs_next(self) -> bool:
        """Whether a tap needs `predict` before every step."""
        return self._head is not None

    def predict(self, rows: Tensor, hidden: Tensor, ids: Tensor, live: Tensor) -> None:
        """Take the log-probability of the ids [n] that the rows [n] read next, which hidden [n, D] predicts.

        live: [n] bool, the rows that are not finished.
        """
        assert self._head is not None
        read = (live & self._head.counts(ids)).nonzero()[:, 0]
        place = rows[read].to(hidden.device)
        logprob = self._head.logprobs(hidden[read.to(hidden.device)], ids[read].to(hidden.device))
        self._count[place] += 1
        self._total[place] += logprob
        self._least[place] = torch.minimum(self._least[place], logprob)

    def read(self, rows: Tensor, hidden: Tensor, state: Callable[[int], Tensor | None]) -> Tensor:
        """[n, F] after the tokens just fed to the rows [n].

        Args:
            hidden: [n, D] the trunk's output.   state: a layer's number -> its [n, D]; None: `hidden`.
        """
        self._steps += 1
        rows = rows.to(hidden.device)
        return torch.cat([self._read(tap, rows, hidden, state).to(hidden.dtype) for tap in self._taps], dim=1)

    def _read(self, tap: Tap, rows: Tensor, hidden: Tensor, state: Callable[[int], Tensor | None]) -> Tensor:
        if tap.kind == "logprob":
            return torch.stack([self._total[rows] / self._count[rows].clamp_min(1), self._least[rows]], dim=1)
        found = state(tap.layer)
        found = hidden if found is None else found
        if tap.kind == "last":
            return found
        if tap not in self._sums:
            self._sums[tap] = found.new_zeros(len(self._total), found.shape[1], dtype=torch.float32)
        self._sums[tap][rows] += found.float()
        return self._sums[tap][rows] / self._steps
