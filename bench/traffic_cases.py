"""The calls that bench/traffic.py counts, small enough for the interpreter. `CASES` has a function to count each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.advantages import triton as advantages  # type: ignore[attr-defined]
from ..kernels.advantages.contract import Inputs as AdvantageInputs
from ..kernels.ensemble_reward import triton as ensemble  # type: ignore[attr-defined]
from ..kernels.ensemble_reward.contract import Inputs as EnsembleInputs
from ..kernels.ensemble_reward.contract import Needs as EnsembleNeeds
from ..kernels.ensemble_reward.contract import OutputGrads as EnsembleGrads
from ..kernels.linear_logprob import triton as logprob  # type: ignore[attr-defined]
from ..kernels.linear_logprob.contract import Inputs as LogprobInputs
from ..kernels.linear_logprob.contract import Needs as LogprobNeeds
from ..kernels.linear_logprob.contract import OutputGrads as LogprobGrads
from ..kernels.linear_logprob.contract import Saved as LogprobSaved
from ..kernels.preference_step import triton as preference  # type: ignore[attr-defined]
from ..kernels.preference_step.contract import Inputs as PreferenceInputs
from .traffic_count import Report, counting

ROWS, STORED, DIM, HEADS, DIRECTIONS = 48, 80, 256, 5, 32  # all different, so that a size identifies its dimension
TOKENS, VOCABULARY = 100, 500


def _report(op: str, mode: str, call: Callable[[], Any], inputs: Sequence[Any], rows: tuple[int, ...]) -> Report:
    """Count `call`, which returns its outputs. The floor is one access to each per-row tensor of inputs and outputs."""
    with counting() as accesses:
        outputs = call()
    once = [t for t in (*inputs, *outputs) if isinstance(t, Tensor) and any(size in rows for size in t.shape)]
    return Report(op, mode, rows, sum(t.nbytes for t in once) / rows[0], accesses)


def _ensemble_inputs(
    norm: bool = True, gather: bool = False, spec: str = "tradeoff:0.4", trust: bool = False
) -> EnsembleInputs:
    g = torch.Generator().manual_seed(0)
    stored = STORED if gather else ROWS
    region: dict[str, Tensor] = {}
    if trust:
        region = {"mean": torch.zeros(DIM), "precision": torch.ones(DIM), "directions": torch.ones(DIRECTIONS, DIM),
                  "weights": torch.ones(DIRECTIONS), "unit": torch.ones(1), "rms": torch.ones(1)}  # fmt: skip
    return EnsembleInputs(
        hidden=torch.randn(stored, DIM, generator=g).bfloat16(),
        weight=torch.randn(2 * HEADS, DIM, generator=g),
        bias=torch.randn(2 * HEADS, generator=g),
        rows=torch.randperm(stored, generator=g)[:ROWS] if gather else None,
        norm_weight=torch.ones(DIM).bfloat16() if norm else None,
        seed=torch.tensor([7]),
        shift=None, scale=None, std_ref=None, group=None, group_size=0, norm_eps=1e-6, std_floor=1e-3, aggregation=spec,
        **{f"trust_{name}": value for name, value in region.items()},  # type: ignore[arg-type]
    )  # fmt: skip


def _ensemble_forward(op: str, mode: str) -> Report:
    trust = "trust" in mode
    spec = "tradeoff:0.4,trust=1,centre=batch" if trust else "tradeoff:0.4,centre=batch"
    inputs = _ensemble_inputs("norm" in mode, "last tokens" in mode, spec, trust)
    read = [inputs.hidden[:ROWS], inputs.rows]
    return _report(op, mode, lambda: ensemble.forward(inputs, "kept" in mode), read, (ROWS, STORED))


def _ensemble_backward(op: str, mode: str) -> Report:
    trust = "trust" in mode
    inputs = _ensemble_inputs(spec="tradeoff:0.4,trust=1" if trust else "tradeoff:0.4", trust=trust)
    saved = ensemble.forward(inputs, True)[-1]
    grads = EnsembleGrads(torch.ones(ROWS), torch.ones(ROWS, HEADS), torch.ones(ROWS, HEADS), reward_sum=None)
    head = "frozen head" not in mode
    needs = EnsembleNeeds(hidden="frozen trunk" not in mode, weight=head, bias=head, norm_weight=head)
    call = lambda: ensemble.backward(grads, inputs, saved, needs)  # noqa: E731
    return _report(op, mode, call, [inputs.hidden, saved, *grads], (ROWS, STORED))


def _preference(op: str, mode: str) -> Report:
    """A pair has two rows, one for each response."""
    g = torch.Generator().manual_seed(0)
    brme, pairs = mode.startswith("brme"), ROWS // 2
    inputs = PreferenceInputs(
        features=torch.randn(ROWS, DIM, generator=g).bfloat16(), weight=torch.randn(2 * HEADS, DIM, generator=g),
        bias=torch.zeros(2 * HEADS), rows=None,
        head_id=torch.randint(HEADS, (pairs,), generator=g) if brme else None,
        p_hat=torch.rand(pairs, generator=g) if brme else None, margin=None,
        seed=torch.tensor([7]) if "sampled" in mode else None,
        loss="brme" if brme else "bt", alpha=4.0, bsr=1e-3, centre=0.0, std_floor=1e-3,
    )  # fmt: skip
    read = [inputs.features, inputs.head_id, inputs.p_hat]
    return _report(op, mode, lambda: preference.step(inputs), read, (ROWS, pairs))


def _advantages(op: str, mode: str) -> Report:
    g = torch.Generator().manual_seed(0)
    logprob_, ref_logprob, value = (torch.randn(ROWS, TOKENS, generator=g) for _ in range(3))
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    whiten = "sample" if "whitened" in mode else "none"
    inputs = AdvantageInputs(
        score=torch.randn(ROWS, generator=g), logprob=logprob_, ref_logprob=ref_logprob, value=value, mask=mask,
        gamma=1.0, lam=0.95, kl_coef=0.05, kl_estimator="k1", kl_clip=float("inf"), holes="skip", score_at="last",
        whiten=whiten,
    )  # fmt: skip
    return _report(op, mode, lambda: advantages.forward(inputs), inputs.tensors, (ROWS,))


def _logprob(op: str, mode: str) -> Report:
    """The vendor's matrix products are not counted, so the floor is that of the tiles of logits, which they write."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(ROWS, DIM, generator=g), torch.randn(VOCABULARY, DIM, generator=g)
    inputs = LogprobInputs(hidden, weight, torch.randint(VOCABULARY, (ROWS,), generator=g), 1.0, None, None)
    logits = torch.empty(ROWS, VOCABULARY)
    if mode == "forward, tiles":
        return _report(op, mode, lambda: logprob.forward(inputs, None), [logits, inputs.target], (ROWS,))
    saved = LogprobSaved(*logprob.forward(inputs, None)[1:])
    grads = LogprobGrads(torch.ones(ROWS), torch.ones(ROWS), lse=None)

    def call() -> list[Tensor]:
        logprob.backward(grads, inputs, None, saved, LogprobNeeds(hidden=True, weight=True))
        return [logits]  # the derivative: as many numbers

    return _report(op, mode, call, [logits, inputs.target, saved.entropy, saved.lse, *grads], (ROWS,))


CASES: dict[tuple[str, str], Callable[[str, str], Report]] = {
    ("ensemble_reward", "forward, norm"): _ensemble_forward,
    ("ensemble_reward", "forward"): _ensemble_forward,
    ("ensemble_reward", "forward, norm, products kept"): _ensemble_forward,
    ("ensemble_reward", "last tokens, norm"): _ensemble_forward,
    ("ensemble_reward", "forward, norm, trust"): _ensemble_forward,
    ("ensemble_reward", "forward, trust"): _ensemble_forward,
    ("ensemble_reward", "backward, norm"): _ensemble_backward,
    ("ensemble_reward", "backward, norm, frozen trunk"): _ensemble_backward,
    ("ensemble_reward", "backward, norm, frozen head"): _ensemble_backward,
    ("ensemble_reward", "backward, norm, trust"): _ensemble_backward,
    ("linear_logprob", "forward, tiles"): _logprob,
    ("linear_logprob", "backward, tiles"): _logprob,
    ("advantages", "GAE"): _advantages,
    ("advantages", "GAE, whitened"): _advantages,
    ("preference_step", "bt, batch sum"): _preference,
    ("preference_step", "brme, batch sum"): _preference,
    ("preference_step", "brme sampled, batch sum"): _preference,
}
