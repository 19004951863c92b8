"""Fill the README's tables of GPU goals from the kept reports of gpu_check and ppo_gpu, bench/results/gpu_*.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import gpu_goals, ppo_gpu

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
_OPS = (
    "`ensemble_reward` with K = 5 heads on [65536, 4096] features and on the last tokens of [256, 1024, 4096], "
    "`linear_logprob` with T = 16384 (QuACK's: 4096), D = 4096, V = 128256; all bf16:"
)
_PPO = "The PPO loop with 5 heads, reference and critic, on random weights of the true shapes:"


def write() -> str:
    """Write the block between the README's markers from the files in bench/results; a sentence on what was read."""
    files = sorted(RESULTS.glob("gpu_*.json"))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md: expected the lines {BEGIN} and {END}, got a file without them")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(before + block(files) + after, encoding="utf-8")
    return f"written: README.md, from {', '.join(file.name for file in files) or 'no result: nothing is measured'}"


def block(files: Sequence[Path]) -> str:
    """The README's block, markers included. ValueError for a dry run or results of several commits or machines."""
    reports = [_load(file) for file in files]
    origins = sorted({_origin(report) for report in reports})
    if len(origins) > 1:
        raise ValueError(f"{RESULTS}: expected results of one machine and commit, got {' and '.join(origins)}")
    ops = [row for report in reports if "stages" in report for row in report["rows"]]
    parts = [row for report in reports if "stages" not in report for row in report["rows"]]
    where = f"Measured on {origins[0]}." if origins else "Asked of an H200; nothing is measured yet."
    tables = (
        (_OPS, gpu_goals.verdicts([row for row in ops if row["timings"]])),
        (_PPO, gpu_goals.verdicts(parts, ppo_gpu.GOALS)),
    )
    lines = [where]
    for title, found in tables:
        lines += ["", title, "", gpu_goals.goals_table(found)]
    return "\n".join([BEGIN, *lines, END])


def _load(file: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if report["dry"]:
        raise ValueError(f"{file}: expected a report of a GPU, got a dry run's")
    return report


def _origin(report: dict[str, Any]) -> str:
    here = report["machine"]
    versions = here["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
    return f"{here['name']}, commit {here['commit'][:12]}, {packages}"
