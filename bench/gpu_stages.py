"""The stages of `bench/gpu_check.py`, each run in a child process so that a broken GPU context ends only that stage.

A stage rewrites its JSON file after each finding, so that a killed stage keeps its findings: notes (sentences), failed
(ops) and keys of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gpu_time, gpu_timing

Call = Callable[[], list[Tensor]]


class Result:
    """The stage's JSON file, rewritten at every change."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {"notes": [], "failed": [], "rows": []}

    def save(self, **fields: Any) -> None:
        self.content.update(fields)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content), encoding="utf-8")
        part.replace(self.path)  # whoever reads it meanwhile, or after a kill, finds a whole file

    def note(self, text: str, failed: str | None = None) -> None:
        """Add a sentence to the report; `failed` names an op that must not be timed."""
        self.content["notes"].append(text)
        if failed is not None and failed not in self.content["failed"]:
            self.content["failed"].append(failed)
        self.save()


def _ensemble(device: torch.device, seed: Tensor) -> Call:
    from ..kernels.ensemble_reward import ensemble_reward

    g = torch.Generator(device).manual_seed(1)
    new = partial(torch.randn, generator=g, device=device)
    leaves = [new(300, 1000).bfloat16(), new(10, 1000), new(10), 1 + 0.1 * new(1000)]
    for leaf in leaves:
        leaf.requires_grad_()
    rows = torch.randint(300, (257,), generator=g, device=device)
    upstream = [new(257), new(257, 5), new(257, 5)]

    def call() -> list[Tensor]:
        hidden, weight, bias, norm = leaves
        out = ensemble_reward(hidden, weight, bias, rows=rows, norm_weight=norm, seed=seed,
                              aggregation="tradeoff:0.4,centre=batch")  # fmt: skip
        return [*out[:4], *torch.autograd.grad((out.reward, out.mean, out.std), leaves, upstream)]

    return call


def _logprob(device: torch.device, seed: Tensor) -> Call:
    from ..kernels.linear_logprob import linear_logprob

    g = torch.Generator(device).manual_seed(2)
    hidden = torch.randn(67, 264, generator=g, device=device).bfloat16().requires_grad_()
    weight = torch.randn(1003, 264, generator=g, device=device).div(16).bfloat16().requires_grad_()
    target = torch.randint(1003, (67,), generator=g, device=device)
    upstream = [torch.randn(67, generator=g, device=device) for _ in range(3)]

    def call() -> list[Tensor]:
        out = linear_logprob(hidden, weight, target)
        return [*out, *torch.autograd.grad(tuple(out), (hidden, weight), upstream)]

    return call


def _advantages(device: torch.device, seed: Tensor) -> Call:
    from ..kernels.advantages import advantages

    g = torch.Generator(device).manual_seed(3)
    score, *rest = (torch.randn(shape, generator=g, device=device) for shape in ((7,), (7, 133), (7, 133), (7, 133)))
    logprob, ref_logprob, value = rest
    mask = torch.arange(133, device=device) < torch.randint(1, 134, (7, 1), generator=g, device=device)

    def call() -> list[Tensor]:
        out = advantages(score, logprob, ref_logprob, value, mask)
        return [*out[:4], *out.stats]

    return call


def _step(device: torch.device, seed: Tensor) -> Call:
    from ..kernels.preference_step import preference_step

    g = torch.Generator(device).manual_seed(4)
    features = torch.randn(66, 1000, generator=g, device=device).bfloat16()
    weight, bias = torch.randn(10, 1000, generator=g, device=device), torch.randn(10, generator=g, device=device)
    head_id = torch.randint(5, (33,), generator=g, device=device)
    p_hat = torch.rand(33, generator=g, device=device)

    def call() -> list[Tensor]:
        out = preference_step(features, weight, bias, loss="brme", head_id=head_id, p_hat=p_hat, seed=seed, bsr=1e-3)
        return [t for t in out if t is not None]

    return call


# op -> (a call with gradients on fixed inputs of odd shape, whether the seed changes its result)
OPS: dict[str, tuple[Callable[[torch.device, Tensor], Call], bool]] = {
    "ensemble_reward": (_ensemble, True),
    "linear_logprob": (_logprob, False),
    "advantages": (_advantages, False),
    "preference_step": (_step, True),
}


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether both are equal and finite: a NaN is a fault even if it repeats, because the inputs are ordinary."""
    return all(bool(x.isfinite().all()) and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _each(result: Result, device: torch.device, check: Callable[[Call, Tensor, bool], str]) -> None:
    """Run `check` on every op; it returns a fault in a few words, or ""."""
    for op, (make, sampled) in OPS.items():
        seed = torch.tensor([11], device=device)
        try:
            fault = check(make(device, seed), seed, sampled)
        except Exception as error:  # a fault of one op must not stop the others
            fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        result.note(f"{op}: {fault or 'holds'}", op if fault else None)


def determinism(result: Result, device: torch.device, dry: bool) -> None:
    """Outputs and gradients have the same bits in 100 runs (3 in a dry run)."""
    runs = 3 if dry else 100

    def check(call: Call, seed: Tensor, sampled: bool) -> str:
        first = [t.clone() for t in call()]
        for i in range(1, runs):
            if not _same(first, call()):
                return f"run {i + 1} of {runs} has other bits, or a value that is not finite"
        return ""

    _each(result, device, check)


def _captured(call: Call, device: torch.device) -> Call:
    """`call` captured and replayed as a CUDA graph; on a CPU, the call itself."""
    if device.type != "cuda":
        return call
    replay = gpu_time.capture(call)

    def synchronised() -> list[Tensor]:
        outputs: list[Tensor] = replay()
        torch.cuda.synchronize()
        return outputs

    return synchronised


def graphs(result: Result, device: torch.device, dry: bool) -> None:
    """A replayed graph gives the eager call's bits; a new seed changes the results of sampling ops only."""

    def check(call: Call, seed: Tensor, sampled: bool) -> str:
        replay = _captured(call, device)
        first = [t.clone() for t in replay()]
        if not all(bool(t.isfinite().all()) for t in first):
            return "a value is not finite"
        if not _same(first, replay()):
            return "two replays with one seed differ"
        if not _same(first, call()):
            return "a replay differs from the eager call"
        seed.add_(1)
        other = [t.clone() for t in replay()]
        if _same(first, other) == sampled:
            return "a new seed does not change a replay" if sampled else "a new seed changes a replay without sampling"
        return "" if _same(other, call()) else "with a new seed a replay differs from the eager call"

    _each(result, device, check)


def small(result: Result, device: torch.device, dry: bool) -> None:
    """Run every op once, forward and backward, for compute-sanitizer."""

    def check(call: Call, seed: Tensor, sampled: bool) -> str:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return ""

    _each(result, device, check)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage. The file has its findings; the exit code only says whether it finished."""
    flags = argparse.ArgumentParser(prog="python -m prudent.bench.gpu_stages", description=__doc__)
    flags.add_argument("stage", choices=["determinism", "graphs", "small", "goals", "timing"])
    flags.add_argument("result", type=Path)
    flags.add_argument("--dry", action="store_true")
    flags.add_argument("--skip", nargs="*", default=[], help="keys of timed cases that are done or ended a process")
    flags.add_argument("--without", nargs="*", default=[], help="ops that timing leaves out")
    given = flags.parse_args(argv)
    device, result = torch.device("cpu" if given.dry else "cuda"), Result(given.result)
    result.save()
    if given.stage in ("goals", "timing"):
        found = gpu_timing.plan(given.dry, goals=given.stage == "goals")
        left = [t for t in found if t.key not in given.skip and t.case.op not in given.without]
        gpu_timing.timing(result, device, given.dry, left)
    else:
        {"determinism": determinism, "graphs": graphs, "small": small}[given.stage](result, device, given.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
