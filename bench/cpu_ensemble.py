"""Time the fused reward head on this CPU beside the bare matrix product, eager torch and torch.compile.

    python -m prudent.bench.cpu_ensemble [--shapes 8192x4096 65536x1024 16x4096] [--dtypes bf16 fp32] [--out FILE]
    python -m prudent.bench.cpu_ensemble --distance --shapes 8192x4096 65536x1024 --out FILE    of these, the distance
    python -m prudent.bench.cpu_ensemble --gradients --shapes 8192x4096 --out FILE              of these, the gradients

All candidates of a case run in turns in one process on the same tensors; the tables show medians over the turns. Times
are the wall's; with `--cpu-time` they are the process's CPU time, the only steady one on a machine that others use too.
It counts threads that wait, so set OMP_NUM_THREADS=1. Where memory comes from matters to every side's gradients: the
variables in ALLOCATOR, of torch and of glibc, are part of a case's name if they are set.

    linear     F.linear(hidden, weight) alone, weight [2K, D] in hidden's dtype: one read of the features
    ours       prudent.ensemble_reward: with the trunk's RMSNorm, without it, with the norm and sampling
    eager      RMSNorm as transformers writes it, F.linear, softplus, trade-off of the nominal and the worst head
    compiled   torch.compile of eager
    gradients  forward + backward of ours, eager and compiled, for hidden, weight, bias and norm weight; `head
               gradients` without hidden, as on a frozen trunk
    fresh      writing zeros to a new tensor like hidden: the cost of allocating its gradient
    distance   ours with a trust region and its price: of a diagonal, or of a diagonal and 32 directions
    wide       F.linear(hidden, weight) with as many rows as heads and directions have, 2K + 32

Before a case is timed, ours is checked against the reference in fp64; a case that fails is reported without times.
`--out FILE` writes FILE.json (times, commit, date, machine, versions) and FILE.md, and keeps other cases of an existing
FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import TrustRegion, ensemble_reward
from ..kernels import native
from ..kernels.ensemble_reward import reference
from ..kernels.ensemble_reward.contract import Inputs
from ..kernels.ensemble_reward.trust import measure as measure_distance
from .machine import cpu_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS, NORM_EPS, STD_FLOOR, LAM = 5, 1e-6, 1e-3, 0.4
RANK, SPEC = 32, f"tradeoff:{LAM}"
PRICED = f"{SPEC},trust=1"
FEW_ROWS = 64  # up to this number of rows, the call's overhead dominates, and a turn times CALLS calls
CALLS = 200
ALLOCATOR = ("THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

Score = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Times = dict[str, list[float]]
Clock = Callable[[], float]


class Goal(NamedTuple):
    """A bound on the ratio of two medians or, with `above`, on their difference in microseconds."""

    what: str
    first: str
    second: str
    bound: float
    kind: str = "at most"

    def value(self, medians: dict[str, float]) -> float:
        a, b = medians[self.first], medians[self.second]
        return (a - b) * 1e6 if self.kind == "above" else a / b

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.kind == "at least" else value <= self.bound

    def row(self, medians: dict[str, float]) -> str:
        value = self.value(medians)
        unit = " us" if self.kind == "above" else "x"
        kind = "at most" if self.kind == "above" else self.kind
        holds = "yes" if self.holds(value) else "NO"
        return f"| {self.what} | {value:.2f}{unit} | {kind} {self.bound:g}{unit} | {holds} |"


HEADER = """# `ensemble_reward` on a CPU, beside the bare matrix product

Written by `python -m prudent.bench.cpu_ensemble --out FILE`, whose docstring says what each line is. K = 5 heads. All
times of a case come from one process, in turns.
"""

DISTANCE = (
    Goal("a diagonal / no distance, norm", "distance norm, diagonal", "ours norm", 1.25),
    Goal("a diagonal / no distance, no norm", "distance bare, diagonal", "ours bare", 1.25),
    Goal("32 directions, norm / wide", "distance norm, 32 directions", "wide", 1.3),
    Goal("32 directions, no norm / wide", "distance bare, 32 directions", "wide", 1.3),
)
RATES = (
    *DISTANCE,
    Goal("ours, norm / linear", "ours norm", "linear", 1.3),
    Goal("ours, norm and sampling / linear", "ours sampled", "linear", 1.3),
    Goal("ours, no norm / linear", "ours bare", "linear", 1.15),
    Goal("eager / ours, norm", "eager", "ours norm", 20, "at least"),
    Goal("compiled / ours, norm", "compiled", "ours norm", 6, "at least"),
    Goal("eager / ours, gradients", "eager gradients", "ours gradients", 10, "at least"),
    Goal("compiled / ours, gradients", "compiled gradients", "ours gradients", 4, "at least"),
    Goal("eager / ours, head gradients", "eager head gradients", "ours head gradients", 10, "at least"),
    Goal("compiled / ours, head gradients", "compiled head gradients", "ours head gradients", 4, "at least"),
)
GRADIENTS = tuple(goal for goal in RATES if goal.what.endswith("gradients"))
OVERHEADS = (
    Goal("ours, norm, less linear", "ours norm", "linear", 15, "above"),
    Goal("ours, norm and sampling, less linear", "ours sampled", "linear", 15, "above"),
    Goal("ours, no norm, less linear", "ours bare", "linear", 15, "above"),
)


def composed(hidden: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None) -> Tensor:
    """[N] rewards as users write them: transformers' RMSNorm, a linear layer, Gaussian heads in fp32."""
    if norm is not None:
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)
        hidden = norm * x.to(hidden.dtype)
    mean, raw = (F.linear(hidden, weight).float() + bias).chunk(2, dim=-1)
    std = F.softplus(raw) + STD_FLOOR
    nominal = mean.gather(1, std.argmin(dim=1, keepdim=True))[:, 0]
    return LAM * nominal + (1.0 - LAM) * mean.amin(dim=1)


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None, seed: Tensor | None = None) -> Tensor:
    return ensemble_reward(hidden, weight, bias, norm_weight=norm, norm_eps=NORM_EPS, seed=seed).reward


def region(dim: int, rank: int, g: torch.Generator) -> TrustRegion:
    """A trust region around 0 of which standard normal features are at a distance of about 1."""
    directions = torch.linalg.qr(torch.randn(dim, max(rank, 1), generator=g)).Q.T[:rank].contiguous()
    one = torch.ones(1)
    return TrustRegion(0.1 * torch.randn(dim, generator=g), torch.full((dim,), 1 / dim), directions,
                       torch.full((rank,), -0.5 / dim), one, one)  # fmt: skip


class Case:
    """One shape and dtype: its tensors, its check and its timed candidates."""

    def __init__(self, rows: int, dim: int, dtype: str):
        g = torch.Generator().manual_seed(0)
        self.few = rows <= FEW_ROWS
        self.hidden = torch.randn(rows, dim, generator=g).to(DTYPES[dtype])
        self.weight = (torch.randn(2 * HEADS, dim, generator=g) / dim**0.5).to(DTYPES[dtype])
        self.bias = torch.randn(2 * HEADS, generator=g)
        self.norm = (1 + 0.1 * torch.randn(dim, generator=g)).to(DTYPES[dtype])
        self.seed, self.d_reward = torch.tensor([7]), torch.randn(rows, generator=g)
        self.wide = torch.cat([self.weight, self.weight[:1].repeat(RANK, 1)])
        self.regions = {rank: region(dim, rank, g) for rank in (0, RANK)}
        torch.compiler.reset()  # torch limits recompilations in the whole process, so each case starts anew
        self.compiled: Score = torch.compile(composed, dynamic=False)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias, self.norm

    def gradients(self, score: Score, frozen: bool = False) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in self.tensors]
        leaves[0].requires_grad_(not frozen)
        with torch.enable_grad():
            reward = score(*leaves)
        return torch.autograd.grad(reward, leaves[frozen:], self.d_reward)

    def candidates(self) -> dict[str, tuple[Callable[[], Any], int]]:
        """name -> (function, n): the function runs in every n-th turn; slow ones run less often."""
        x, w, b, g = self.tensors
        found: dict[str, tuple[Callable[[], Any], int]] = {
            "linear": (lambda: F.linear(x, w), 1),
            "ours norm": (lambda: ours(x, w, b, g), 1),
            "ours sampled": (lambda: ours(x, w, b, g, self.seed), 1),
            "ours bare": (lambda: ours(x, w, b, None), 1),
            "eager": (lambda: composed(x, w, b, g), 8),
            "compiled": (lambda: self.compiled(x, w, b, g), 8),
        }
        scores: tuple[tuple[str, Score, int], ...] = (
            ("ours", ours, 8),
            ("eager", composed, 16),
            ("compiled", self.compiled, 16),
        )
        if not self.few:
            found["fresh"] = (lambda: torch.empty_like(x).zero_(), 8)
        for norm_name, norm in () if self.few else (("norm", g), ("bare", None)):
            for rank, own in self.regions.items():
                named = f"distance {norm_name}, {f'{rank} directions' if rank else 'diagonal'}"
                found[named] = (partial(self.priced, norm, own), 1)
        if not self.few:
            found["wide"] = (lambda: F.linear(x, self.wide), 1)
        for name, score, every in () if self.few else scores:
            found[f"{name} gradients"] = (partial(self.gradients, score), every)
            found[f"{name} head gradients"] = (partial(self.gradients, score, frozen=True), every)
        return found

    def priced(self, norm: Tensor | None, own: TrustRegion) -> tuple[Tensor, Tensor]:
        """(reward, distance) of ours with a trust region."""
        out = ensemble_reward(self.hidden, self.weight, self.bias, norm_weight=norm, norm_eps=NORM_EPS,
                              aggregation=PRICED, trust=own)  # fmt: skip
        assert out.distance is not None
        return out.reward, out.distance

    def check_distance(self) -> str:
        """The same for the distances, of which the first rows are compared; directions may be rounded as hidden is."""
        x, few = self.hidden[:512], slice(512)
        for rank, own in self.regions.items():
            for norm in (self.norm, None):
                wide = x.double()
                if norm is not None:
                    wide = F.rms_norm(wide, wide.shape[1:], norm.double(), NORM_EPS)
                exact = measure_distance(wide, own).distance
                rounded = own._replace(directions=own.directions.to(x.dtype))
                plain = measure_distance(wide.to(x.dtype).float(), rounded).distance
                error, bound = (
                    float((d[few].double() - exact).abs().max()) for d in (self.priced(norm, own)[1], plain)
                )
                if not error <= bound + 2e-5 * float(exact.max()):
                    return f"distance of rank {rank}: error {error:.3g}, of eager {bound:.3g}"
        return ""

    def check(self) -> str:
        """'' if ours is right, else the fault: its error against fp64 must be at most eager's and 2e-5 of the largest
        value.
        """
        leaves = [t.double().requires_grad_() for t in self.tensors]
        x, w, b, g = leaves
        inputs = Inputs(x, w, b, None, g, None, None, None, None, None, 0, NORM_EPS, STD_FLOOR, SPEC)
        exact = [e := reference.forward(inputs)[0], *torch.autograd.grad(e, leaves, self.d_reward.double())]
        names = ("reward", *(f"gradient of {name}" for name in ("hidden", "weight", "bias", "norm_weight")))
        with torch.no_grad():
            rewards = [score(*self.tensors) for score in (ours, composed)]
        found, eager = ([r, *self.gradients(s)] for r, s in zip(rewards, (ours, composed), strict=True))
        for name, want, got, plain in zip(names, exact, found, eager, strict=True):
            error, bound = (float((t.double() - want).abs().max().detach()) for t in (got, plain))
            if not error <= bound + 2e-5 * float(want.detach().abs().max()):
                return f"{name}: error {error:.3g}, of eager {bound:.3g}"
        with torch.no_grad():
            return self.check_distance()


def measure(case: Case, seconds: float, wanted: set[str] | None = None, clock: Clock = time.perf_counter) -> Times:
    """Time candidates in turns for about `seconds`: name -> seconds per call, one number per turn. wanted: their names;
    None: all.
    """
    candidates, times, turn = case.candidates(), Times(), 0
    if wanted is not None:
        candidates = {name: run for name, run in candidates.items() if name in wanted}
    with torch.no_grad():
        for run, _ in candidates.values():
            _time(run, 3, clock)
        stop = time.perf_counter() + seconds
        while turn == 0 or time.perf_counter() < stop:
            for name, (run, every) in candidates.items():
                if turn % every == 0:
                    times.setdefault(name, []).append(_time(run, CALLS if case.few else 1, clock))
            turn += 1
    return times


def _time(run: Callable[[], Any], calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def run_case(
    rows: int, dim: int, dtype: str, seconds: float, wanted: set[str] | None = None, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Run a case: a record of machine, versions and `times` {name: {median, least, count}} in seconds, or `failed`."""
    case = Case(rows, dim, dtype)
    record: dict[str, Any] = {"rows": rows, "dim": dim, "dtype": dtype, "heads": HEADS} | _here()
    record["clock"] = "Wall time" if clock is time.perf_counter else "CPU time"
    record["failed"] = case.check()
    record["times"] = {}
    for name, times in ({} if record["failed"] else measure(case, seconds, wanted, clock)).items():
        record["times"][name] = {"median": statistics.median(times), "least": min(times), "count": len(times)}
    return record


def _here() -> dict[str, Any]:
    timed: tuple[str, ...] = (
        "CMakeLists.txt",
        "kernels/csrc",
        "kernels/native.py",
        "kernels/eager.py",
        "bench/cpu_ensemble.py",
    )
    timed += tuple(
        f"kernels/ensemble_reward/{name}.py" for name in ("contract", "cpu", "op", "reference", "spec", "trust")
    )
    changed = _git("status", "--porcelain", "--", *timed) not in ("", "unknown")
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD") + (" and changes" if changed else ""),
        "date": str(date.today()),
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": native.isa() if native.load() else "none: the reference",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "huge_pages": _huge_pages(),
    }


def _huge_pages() -> str:
    """The kernel's mode of transparent huge pages: always, madvise, never, or none if it has none."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().partition("[")[2].partition("]")[0] if path.is_file() else "none"


def _name(rows: int, dim: int, dtype: str) -> str:
    """A case's name: shape, dtype, and the allocator's variables that are set."""
    return ", ".join([f"[{rows}, {dim}] {dtype}", *(f"{v}={os.environ[v]}" for v in ALLOCATOR if v in os.environ)])


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def table(name: str, record: dict[str, Any]) -> str:
    """One case as markdown: the times, and each goal beside its measured value."""
    few = record["rows"] <= FEW_ROWS
    where = "{machine}, {threads} threads, {isa}, torch {torch}, commit {commit}, {date}."
    where += f" {record.get('clock', 'Wall time')}."
    if "huge_pages" in record:
        where += f" Transparent huge pages: {record['huge_pages']}."
    lines = [f"## {name}", "", where.format(**record), ""]
    if record["failed"]:
        return "\n".join([*lines, f"NOT TIMED, the check failed: {record['failed']}.", ""])
    unit, scale = ("us", 1e6) if few else ("ms", 1e3)
    lines += [f"| | median, {unit} | least, {unit} | turns |", "|---|---|---|---|"]
    for candidate, t in record["times"].items():
        lines.append(f"| {candidate} | {t['median'] * scale:.2f} | {t['least'] * scale:.2f} | {t['count']} |")
    medians = {candidate: t["median"] for candidate, t in record["times"].items()}
    lines += ["", "| | measured | goal | holds |", "|---|---|---|---|"]
    goals = OVERHEADS if few else RATES
    lines += [goal.row(medians) for goal in goals if {goal.first, goal.second} <= set(medians)]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8192x4096", "65536x1024", "16x4096"], metavar="ROWSxDIM")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each case (default %(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--distance", action="store_true", help="time only what the goals of the distance compare")
    only.add_argument("--gradients", action="store_true", help="time only the gradients, and `fresh`")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time instead of wall time")
    parser.add_argument("--out", type=Path, help="FILE: writes FILE.json and FILE.md")
    given = parser.parse_args()
    goals = DISTANCE if given.distance else GRADIENTS if given.gradients else ()
    wanted = {name for goal in goals for name in (goal.first, goal.second)} | ({"fresh"} if given.gradients else set())
    clock = time.process_time if given.cpu_time else time.perf_counter
    path = given.out and given.out.with_suffix(".json")
    records: dict[str, Any] = json.loads(path.read_text()) if path and path.is_file() else {}
    for shape in given.shapes:
        rows, dim = (int(number) for number in shape.split("x"))
        for dtype in given.dtypes:
            record = run_case(rows, dim, dtype, given.seconds, wanted if goals else None, clock)
            records[_name(rows, dim, dtype)] = record
            print(table(_name(rows, dim, dtype), record), flush=True)
    if path:
        path.write_text(json.dumps(records, indent=2) + "\n")
        text = [HEADER, *(table(name, record) for name, record in records.items())]
        path.with_suffix(".md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
