"""The stages of `bench/gpu_check.py`, each run in a child process so that a broken GPU context ends only that stage.

A stage rewrites its JSON file after each finding, so that a killed stage keeps its findings: notes (sentences), failed
(ops) and keys of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cases, gpu_time, machine, measure, report
from .case import Case, Check, Work, compare, generator, num_sets
from .gpu_goals import GOALS, LAST
from .ops import ensemble_reward

Call = Callable[[], list[Tensor]]


class Result:
    """The stage's JSON file, rewritten at every change."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {"notes": [], "failed": [], "rows": []}

    def save(self, **fields: Any) -> None:
        self.content.update(fields)
        self.path.write_text(json.dumps(self.content), encoding="utf-8")

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
        out = linear_logprob(
            hidden, weight, target, ignore_index=None
        )  # an ignore_index makes the call wait for the GPU
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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> list[Tensor]:
        graph.replay()
        torch.cuda.synchronize()
        return outputs

    return replay


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


def describe(result: Result, device: torch.device, dry: bool) -> None:
    """Report the machine with its measured rates, missing packages of later stages, and the cases to time."""
    for name, why in (("triton", "no kernel runs"), ("liger_kernel", "no comparison"), ("cut_cross_entropy", "none")):
        if find_spec(name) is None:
            result.note(f"{name} is not installed: {why}")
    result.save(cases=[(case.op, case.name) for case in timed_cases(dry)])
    result.save(machine=asdict(machine.describe(device, quick=dry)))


def timed_cases(dry: bool) -> list[Case]:
    """The goals' cases first, then all others of the device's size; in a dry run the smallest case of each op."""
    size = "smoke" if dry else "full"
    rows, dim = ensemble_reward.ROWS[size][0]
    found = [*cases.select("cpu" if dry else "cuda", size), _backward_case(rows, dim, size)]
    if dry:
        found = [*{case.op: case for case in reversed(found[:-1])}.values(), found[-1]]
    goals = [goal.case for goal in GOALS]
    return sorted(found, key=lambda case: goals.index(case.name) if case.name in goals else len(goals))


def _backward_case(rows: int, dim: int, size: str) -> Case:
    """A case that times the backward alone, on one retained graph."""
    moved = ensemble_reward.backward_bytes(rows, dim, "bf16", True)
    make = partial(_backward_work, rows, dim)
    flops = 2 * 2 * rows * dim * 2 * ensemble_reward.HEADS
    return Case("ensemble_reward", "backward, norm", f"{rows} x {dim}", "bf16", size, moved, flops, make)


def _backward_work(rows: int, dim: int, device: torch.device) -> Work:
    g = generator(device, 5)
    new = partial(torch.randn, generator=g, device=device)
    columns = 2 * ensemble_reward.HEADS
    upstream = [new(rows, ensemble_reward.HEADS) for _ in range(2)]
    weight = (new(columns, dim) / dim**0.5).bfloat16().requires_grad_()
    bias, norm = new(columns).requires_grad_(), (1 + 0.1 * new(dim)).bfloat16().requires_grad_()
    score = {"ours": ensemble_reward.fused, "eager": ensemble_reward.composed}
    sets: list[tuple[Any, ...]] = []
    for _ in range(num_sets(device)):
        leaves = (new(rows, dim).bfloat16().requires_grad_(), weight, bias, norm)
        sets.append((leaves, {name: function(*leaves)[1:3] for name, function in score.items()}))

    def gradients(name: str, leaves: tuple[Tensor, ...], outputs: dict[str, Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[name], leaves, upstream, retain_graph=True)

    def check() -> Check:
        leaves, outputs = sets[0]
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        x = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + ensemble_reward.EPS) * wide[3]
        mean, raw = (x @ wide[1].T + wide[2]).chunk(2, dim=-1)
        exact = torch.autograd.grad((mean, F.softplus(raw)), wide, [u.double() for u in upstream])
        names = ("hidden", "weight", "bias", "norm_weight")
        ours, eager = (gradients(name, leaves, outputs) for name in ("ours", "eager"))
        return compare(*(dict(zip(names, found, strict=True)) for found in (ours, eager, exact)))

    return Work(sets, {name: partial(gradients, name) for name in score}, check, grad=True)


def timing(result: Result, device: torch.device, dry: bool, names: list[str], ceilings: Path, seconds: float) -> None:
    """Measure the cases one by one; write each name to the file before the case runs, which may kill the process."""
    known = {case.name: case for case in timed_cases(dry)}
    here = machine.Machine(**json.loads(ceilings.read_text(encoding="utf-8")))
    for name in names:
        result.save(running=name)
        row = measure.measure(_without_tuning(known[name]), device, seconds)
        fields = report.to_json([row], here)["rows"][0]
        if row.timings and device.type == "cuda" and name == LAST:
            fields.update(launches(known[name], device))
        result.content["rows"].append(fields)
        result.save(running=None)


def _without_tuning(case: Case) -> Case:
    """linear_logprob without max-autotune: at [16384, 128256] it takes minutes and serves no goal."""
    if case.op != "linear_logprob":
        return case

    def make(device: torch.device) -> Work:
        work = case.make(device)
        work.variants.pop("autotuned", None)
        return work

    return replace(case, make=make)


def launches(case: Case, device: torch.device, calls: int = 20) -> dict[str, Any]:
    """kernels: the number of kernels that one call of ours launches; device_us: their device time, the median over
    calls, each from a cold cache.
    """
    work, gpu = case.make(device), gpu_time.Gpu()
    ours = work.variants["ours"]
    totals, counts = [], []
    with torch.no_grad():
        ours(*work.inputs[0])
        for i in range(calls):
            gpu.read()
            gpu.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                ours(*work.inputs[i % len(work.inputs)])
                torch.cuda.synchronize()
            kernels = [e for e in profiler.events() or [] if str(e.device_type).endswith("CUDA")]
            totals.append(sum(e.device_time_total for e in kernels))
            counts.append(len(kernels))
    return {"kernels": max(counts), "device_us": statistics.median(totals)} if max(counts) else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage. The file has its findings; the exit code only says whether it finished."""
    flags = argparse.ArgumentParser(prog="python -m prudent.bench.gpu_stages", description=__doc__)
    flags.add_argument("stage", choices=["describe", "determinism", "graphs", "small", "timing"])
    flags.add_argument("result", type=Path)
    flags.add_argument("--dry", action="store_true")
    flags.add_argument("--cases", nargs="*", default=[])
    flags.add_argument("--machine", type=Path, help="JSON of the machine's ceilings, for timing")
    flags.add_argument("--seconds", type=float, default=3.0, help="of measuring, for each timed case")
    given = flags.parse_args(argv)
    device, result = torch.device("cpu" if given.dry else "cuda"), Result(given.result)
    result.save()
    if given.stage == "timing":
        timing(result, device, given.dry, given.cases, given.machine, given.seconds)
    else:
        stages = {"describe": describe, "determinism": determinism, "graphs": graphs, "small": small}
        stages[given.stage](result, device, given.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
