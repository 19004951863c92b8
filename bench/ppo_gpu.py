"""Measure the PPO loop on a GPU in one call: memory at 8B and 14B shapes, speed against the GPU's limits and TRL 1.12.

    python -m prudent.bench.ppo_gpu --out runs/ppo_gpu --trl-path FOLDER
    python -m prudent.bench.ppo_gpu --dry        the same on a CPU: tiny shapes, no GPU numbers

FOLDER has TRL 1.12: pip install --no-deps --target FOLDER trl==1.12.0. It is not needed where TRL 1.12 can be imported;
`bench/gpu.sh carry` collects it, and what else a machine without a network may lack. The weights are random with the
true shapes, so nothing is downloaded. Each part runs in its own process, limited to its memory goal by
set_per_process_memory_fraction; the next part runs even if one fails. ppo_gpu.json and .md are rewritten after each
part.

Rollout step: the time from one token of all rows to the next, over the time of reading the weights once at the measured
bandwidth. Update: the share of the measured bf16 matrix rate, counting 4 operations per weight and token (forward, and
the gradient by the input, because the trunk is frozen; the head only for response tokens), without the work that
checkpointing or padding adds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import machine
from .gpu_goals import Goal, Row, goals_table, verdicts
from .gpu_process import last_line
from .ppo_sides import OurLoop, Sides
from .ppo_trl import SMALL, compare

PARTS = {"8b": ("llama3-8b", "40GB"), "14b": ("qwen2.5-14b", "80GB")}  # shape, memory goal
SIDE_BY_SIDE = "llama3-1b"


def _field(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


GOALS = (
    Goal("8B shape, 64 x (512 + 512), whole loop: peak, GB", "8b", _field("peak_gb"), False, 40, ""),
    Goal("14B shape, 64 x (512 + 512), whole loop: peak, GB", "14b", _field("peak_gb"), False, 80, ""),
    Goal("8B shape: a rollout step over reading the weights once", "8b", _field("step_over_read"), False, 2.5, "x"),
    Goal("8B shape: update, share of the bf16 matrix rate", "8b", _field("update_share"), True, 0.35, "%"),
    Goal("1B shape: our samples a second over TRL 1.12's", "trl", _field("faster"), True, 2, "x"),
    Goal("1B shape: TRL 1.12's peak over ours", "trl", _field("less_memory"), True, 2, "x"),
    Goal("8B shape: planned over measured peak, at least", "8b", _field("planned_over_measured"), True, 0.9, "x"),
    Goal("8B shape: planned over measured peak, at most", "8b", _field("planned_over_measured"), False, 1.1, "x"),
)  # fmt: skip


def loop_part(name: str, dry: bool) -> dict[str, Any]:
    """Run two steps of the loop at a shape and measure the second: peaks, seconds of each phase, and their ratios."""
    from ..rlhf.models.shapes import SHAPES
    from ..rlhf.ppo.budget import PHASES, ModelShape, parse_size, plan
    from ..rlhf.ppo.memory import auto_micro_tokens, job_shape

    shape, goal = PARTS[name]
    device = torch.device("cpu" if dry else "cuda")
    fields = SMALL if dry else {k: v for k, v in SHAPES[shape].items() if k != "model_type"}
    sizes: dict[str, Any] = {"prompts": 4, "prompt_tokens": 8, "response_tokens": 8} if dry else \
        {"prompts": 64, "prompt_tokens": 512, "response_tokens": 512}  # fmt: skip
    sides = Sides(shape=tuple(fields.items()), device=device.type, dtype="float32" if dry else "bfloat16",
                  epochs=1, **sizes)  # fmt: skip
    limit = parse_size(goal)
    if not dry:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    loop = OurLoop(sides, micro_tokens=1)
    config = loop.config.model_copy(update={"rollout": loop.config.rollout.model_copy(
        update={"max_prompt_tokens": sides.prompt_tokens})})  # fmt: skip
    micro = sides.micro_rows * 17 if dry else auto_micro_tokens(config, loop.policy.model.config, limit)
    loop.config = config.model_copy(update={"update": config.update.model_copy(update={"micro_tokens": micro})})
    seconds, peaks = _phases(loop, device)
    row: dict[str, Any] = {"name": name, "shape": "tiny" if dry else shape, "micro_tokens": micro, "seconds": seconds,
                           "engine": loop.sampler.name, "attention": loop.policy.attention}  # fmt: skip
    trunk, head = _multiplied(loop)
    tokens = sides.prompts * (sides.prompt_tokens + sides.response_tokens - 1)
    operations = 4 * (trunk * tokens + head * sides.prompts * sides.response_tokens)
    weights = 2 * (trunk + head)  # bytes
    if dry:
        return row
    model = loop.policy.model.config
    budget = plan(ModelShape.of(model), job_shape(loop.config, model), micro)
    planned = {phase: budget.tensors(phase) for phase in PHASES}
    bandwidth = machine.read_bandwidth(device, 1 << 30)
    del loop
    torch.cuda.empty_cache()
    matrix = machine.matrix_rate(device, torch.bfloat16, 4096)
    peak = max(peaks.values())
    return row | {
        "peak_gb": peak / 1e9, "peaks": peaks, "planned": planned, "bandwidth": bandwidth, "matrix": matrix,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9, "planned_over_measured": max(planned.values()) / peak,
        "step_over_read": seconds["token"] / (weights / bandwidth),
        "update_share": operations / seconds["update"] / matrix,
    }  # fmt: skip


def _multiplied(loop: OurLoop) -> tuple[int, int]:
    """The number of weights that multiply a token, in the trunk and in the head; embedding lookups do not count."""
    model = loop.policy.model
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    whole = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    vocabulary = sum(size for size in {id(w): w.numel() for w in (inputs, outputs)}.values())
    return whole - vocabulary, outputs.numel()


def _phases(loop: OurLoop, device: torch.device) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and peak bytes of each phase in the second step; `token` is one more token of every row."""
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def measured(name: str, call: Callable[[], Any]) -> Any:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated()
        seconds[name] = time.perf_counter() - began
        return result

    whole = loop.config
    for step in range(2):
        samples = measured("rollout", partial(loop.draw, step))
        experience = measured("scoring", partial(loop.score, samples))
        measured("update", partial(loop.update, experience, step))
    seen = dict(peaks)
    half = whole.rollout.max_new_tokens // 2
    short = whole.rollout.model_copy(update={"max_new_tokens": half, "min_new_tokens": half})
    long, loop.config = seconds["rollout"], whole.model_copy(update={"rollout": short})
    measured("half", partial(loop.draw, 2))
    loop.config = whole
    seconds["token"] = (long - seconds.pop("half")) / (whole.rollout.max_new_tokens - half)
    return seconds, seen


def trl_part(dry: bool, python: str, path: str) -> dict[str, Any]:
    """Compare our loop with TRL's on the 1B shape: rates, peaks, and their ratios."""
    from ..rlhf.models.shapes import SHAPES

    fields = SMALL if dry else {k: v for k, v in SHAPES[SIDE_BY_SIDE].items() if k != "model_type"}
    sides = Sides(shape=tuple(fields.items()), device="cpu" if dry else "cuda", dtype="float32" if dry else "bfloat16",
                  prompts=4 if dry else 32, prompt_tokens=8 if dry else 128, response_tokens=8 if dry else 128,
                  micro_rows=2 if dry else 8, steps=2 if dry else 4)  # fmt: skip
    row = compare(sides, (python, path), 1, progress=False)
    return {**row, "name": "trl", "shape": "tiny" if dry else SIDE_BY_SIDE}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: machine, goals, and each part's numbers."""
    title = "PPO on a GPU" + (" (dry: on a CPU, nothing here is a GPU's number)" if report["dry"] else "")
    here = report["machine"]
    lines = [f"# {title}", "", f"{here['date']}, {here['name']}, commit {here['commit'][:12]}.", "",
             goals_table(report["goals"]), "", "| part | shape | seconds | |", "| --- | --- | --- | --- |"]  # fmt: skip
    for row in report["rows"]:
        seconds = ", ".join(f"{k} {v:.3g}" for k, v in row.get("seconds", {}).items())
        notes = [row["error"]] if "error" in row else []
        notes += [f"{side}: {row[side]['error']}" for side in ("ours", "trl") if "error" in row.get(side, {})]
        lines.append(f"| {row['name']} | {row.get('shape', '')} | {seconds} | {'; '.join(notes)} |")
    return "\n".join([*lines, ""])


def _part(name: str, given: argparse.Namespace) -> dict[str, Any]:
    if name == "trl":
        return trl_part(given.dry, given.trl_python, given.trl_path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "prudent.bench.ppo_gpu", "--part", name, "--result", str(file)]
        try:
            done = subprocess.run([*command, *(["--dry"] if given.dry else [])], capture_output=True, text=True,
                                  timeout=given.minutes * 60)  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"name": name, "error": f"out of time after {given.minutes:g} minutes"}
        if done.returncode:
            return {"name": name, "error": last_line(done.stderr)}
        row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return row


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if every part ran, else 1. Whether the goals hold does not change it: the reader judges them."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, default=Path("runs/ppo_gpu"), help="folder of the results")
    flags.add_argument("--dry", action="store_true", help="on a CPU, end to end, with no GPU numbers")
    flags.add_argument("--minutes", type=float, default=8, help="time limit of each part (default %(default)s)")
    flags.add_argument("--parts", nargs="+", choices=(*PARTS, "trl"), default=[*PARTS, "trl"])
    flags.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL 1.12 (default: this)")
    flags.add_argument("--trl-path", default="", help="a folder with TRL 1.12, put first on the path")
    flags.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    flags.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = flags.parse_args(argv)
    if not given.dry and not torch.cuda.is_available():
        raise SystemExit("ppo_gpu: error: no CUDA device here; --dry runs the same on a CPU")
    if given.part:
        given.result.write_text(json.dumps(loop_part(given.part, given.dry)), encoding="utf-8")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    here = asdict(machine.describe("cpu" if given.dry else "cuda", quick=True))
    rows: list[dict[str, Any]] = []
    report = {"dry": given.dry, "machine": here, "rows": rows, "goals": verdicts([], GOALS)}
    for name in given.parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append(_part(name, given))
        # a dry run's numbers are a CPU's
        report["goals"] = verdicts([] if given.dry else rows, GOALS)
        (given.out / "ppo_gpu.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (given.out / "ppo_gpu.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    return int(any("error" in part for row in rows for part in (row, row.get("ours", {}), row.get("trl", {}))))


if __name__ == "__main__":
    sys.exit(main())
