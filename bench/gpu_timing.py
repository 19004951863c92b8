"""Time the cases of a GPU run: the goals' cases first, one row written after each; a child of `gpu_check` runs this."""

from __future__ import annotations

import statistics
from collections.abc import Container
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cases, gpu_time, machine, measure, report
from .case import Case, Check, Work, compare, generator, num_sets
from .gpu_goals import GOALS, LAST, goal_cases
from .ops import ensemble_reward
from .ops.linear_logprob import PEERS

SECONDS = 2.0  # of measuring a case


class Timed(NamedTuple):
    """A case to time. key: the case's name, with more at its second time, which repeats it with every variant."""

    key: str
    case: Case


class Results(Protocol):
    """Where findings go: gpu_stages.Result."""

    content: dict[str, Any]

    def save(self, **fields: Any) -> None: ...


def plan(dry: bool, goals: bool) -> list[Timed]:
    """What to time, in order. A dry run has the cases' smallest shapes.

    goals: each case of a goal, without max-autotune and the peers, which take long or may end the process; then again
    with those that a goal is about. Otherwise all other cases of the device's size, the peers included. Max-autotune
    is timed for no other case: at linear_logprob's [16384, 128256] alone it takes minutes.
    """
    size, device = ("smoke", "cpu") if dry else ("full", "cuda")
    rows, dim = ensemble_reward.ROWS[size][0]
    known = [*cases.select(device, size), _backward_case(rows, dim, size)]
    wanted = goal_cases()
    if dry:  # the same ops, modes and dtypes
        kinds = {_kind(case.name): case.name for case in reversed(known)}
        chosen = list(dict.fromkeys(kinds[_kind(name)] for name in wanted))
    else:
        chosen = wanted
    by_name = {case.name: case for case in known}
    if not goals:
        rest = [case for case in known if case.name not in chosen]
        if dry:
            rest = list({case.op: case for case in reversed(rest)}.values())
        return [Timed(case.name, _without(case, ("autotuned",))) for case in rest]
    first = [Timed(name, _without(by_name[name], ("autotuned", *PEERS))) for name in chosen]
    again = {goal.variant for goal in GOALS} & {"autotuned", *PEERS}
    second = []
    for name in chosen:
        variants = {g.variant for g in GOALS if _kind(g.case) == _kind(name)} & again
        if variants:
            dropped = () if "autotuned" in variants else ("autotuned",)
            second.append(Timed(f"{name}, every variant", _without(by_name[name], dropped)))
    return [*first, *second]


def _kind(name: str) -> tuple[str, ...]:
    """(op, mode, dtype) of a case's name; the mode may have a comma."""
    op, *mode, _, dtype = name.split(", ")
    return op, *mode, dtype


def _without(case: Case, dropped: Container[str]) -> Case:
    """The case without some variants."""

    def make(device: torch.device) -> Work:
        work = case.make(device)
        kept = {name: function for name, function in work.variants.items() if name not in dropped}
        return replace(work, variants=kept)

    return replace(case, make=make)


def timing(result: Results, device: torch.device, dry: bool, todo: list[Timed]) -> None:
    """Measure the cases one by one; write each key to the file before its case runs, which may end the process."""
    result.save(todo=[[timed.case.op, timed.key] for timed in todo])
    here = machine.describe(device, quick=dry)
    result.save(machine=asdict(here))
    for timed in todo:
        result.save(running=timed.key)
        row = measure.measure(timed.case, device, 0.05 if dry else SECONDS)
        fields = report.to_json([row], here)["rows"][0]
        result.content["rows"].append(fields)
        result.save(done=[*result.content.get("done", []), timed.key])
        if row.timings and device.type == "cuda" and timed.case.name == LAST:
            try:
                fields.update(launches(timed.case, device))
            except RuntimeError as error:  # a machine may refuse its profiler
                fields["notes"].append(f"launches: {error}")
        result.save(running=None)


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
