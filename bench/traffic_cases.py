"""The calls that bench/traffic.py counts, small enough for the interpreter. `CASES`: (op, mode) -> a counted Report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.ensemble_reward import triton as ensemble  # type: ignore[attr-defined]
from ..kernels.ensemble_reward.contract import Inputs as EnsembleInputs
from .traffic import Report, counting

ROWS, STORED, DIM, HEADS = 48, 80, 256, 5  # no two alike, so that a size tells what it counts


def _report(op: str, mode: str, call: Callable[[], Any], inputs: Sequence[Any], rows: tuple[int, ...]) -> Report:
    """Count `call`, which returns its outputs. The floor is the tensors with rows among `inputs` and outputs, once."""
    with counting() as accesses:
        outputs = call()
    once = [t for t in (*inputs, *outputs) if isinstance(t, Tensor) and any(size in rows for size in t.shape)]
    return Report(op, mode, rows, sum(t.nbytes for t in once) / rows[0], accesses)


def _ensemble_inputs(norm: bool = True, gather: bool = False, spec: str = "tradeoff:0.4") -> EnsembleInputs:
    g = torch.Generator().manual_seed(0)
    stored = STORED if gather else ROWS
    return EnsembleInputs(
        hidden=torch.randn(stored, DIM, generator=g).bfloat16(),
        weight=torch.randn(2 * HEADS, DIM, generator=g),
        bias=torch.randn(2 * HEADS, generator=g),
        rows=torch.randperm(stored, generator=g)[:ROWS] if gather else None,
        norm_weight=torch.ones(DIM).bfloat16() if norm else None,
        seed=torch.tensor([7]),
        shift=None, scale=None, std_ref=None, group=None, group_size=0, norm_eps=1e-6, std_floor=1e-3, aggregation=spec,
    )  # fmt: skip


def _ensemble_forward(op: str, mode: str) -> Report:
    inputs = _ensemble_inputs("norm" in mode, "last tokens" in mode, "tradeoff:0.4,centre=batch")
    read = [inputs.hidden[:ROWS], inputs.rows]
    return _report(op, mode, lambda: ensemble.forward(inputs, "kept" in mode), read, (ROWS, STORED))


def _ensemble_backward(op: str, mode: str) -> Report:
    inputs = _ensemble_inputs()
    saved = ensemble.forward(inputs, True)[4]
    grads = (torch.ones(ROWS), torch.ones(ROWS, HEADS), torch.ones(ROWS, HEADS), None)
    head = "frozen head" not in mode
    needs = ("frozen trunk" not in mode, head, head, head)
    call = lambda: ensemble.backward(grads, inputs, saved, needs)  # noqa: E731
    return _report(op, mode, call, [inputs.hidden, saved, *grads], (ROWS, STORED))


CASES: dict[tuple[str, str], Callable[[str, str], Report]] = {
    ("ensemble_reward", "forward, norm"): _ensemble_forward,
    ("ensemble_reward", "forward"): _ensemble_forward,
    ("ensemble_reward", "forward, norm, products kept"): _ensemble_forward,
    ("ensemble_reward", "last tokens, norm"): _ensemble_forward,
    ("ensemble_reward", "backward, norm"): _ensemble_backward,
    ("ensemble_reward", "backward, norm, frozen trunk"): _ensemble_backward,
    ("ensemble_reward", "backward, norm, frozen head"): _ensemble_backward,
}
