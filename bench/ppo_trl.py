"""Compare our PPO loop with TRL 1.12's trainer, the last with PPO: samples a second and peak tensor memory on a CPU.

    python -m prudent.bench.ppo_trl --trl-path FOLDER --model MODEL --out bench/results

FOLDER has TRL 1.12: pip install --no-deps --target FOLDER trl==1.12.0. Both sides run the same model, prompts, lengths,
epochs and minibatches, each in its own process, in turns. TRL keeps a reward model and a value model beside the policy,
and a reference if all weights are trained; our loop uses one trunk for all of them. The comparison measures that
difference, with five reward heads on our side and one on theirs. A mode that is not run keeps its earlier rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..rlhf.report.words import count
from . import machine
from .gpu_process import last_line
from .ppo_sides import Sides

MODES = ("lora", "full")
SIZES = ("prompts", "prompt_tokens", "response_tokens", "epochs", "minibatches", "micro_rows", "steps")
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip


def child(side: str, sides: Sides, python: str, path: str, limit: float = 600) -> dict[str, Any]:
    """Run `ppo_sides` in its own process and return its result, or {"error": sentence}."""
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.json", Path(folder) / "result.json"
        sides.write(settings)
        environment = dict(os.environ)
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
        command = [python, "-m", "prudent.bench.ppo_sides", side, str(settings), str(result)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"out of time after {limit:.0f} s"}
        if done.returncode:
            return {"error": last_line(done.stderr)}
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def compare(sides: Sides, trl: tuple[str, str], rounds: int, progress: bool = True) -> dict[str, Any]:
    """One mode's row: {mode, ours, trl: {seconds, samples_per_second, peak}, faster, less_memory}.

    trl: the interpreter and the folder with TRL. faster: our samples a second over theirs; less_memory: their peak over
    ours.
    """
    start = {"ours": (sys.executable, ""), "trl": trl}
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    row: dict[str, Any] = {"mode": sides.mode, "versions": {}, "ours": {}, "trl": {}}
    work = [(side, False) for _ in range(rounds) for side in seconds] + [(side, True) for side in seconds]
    for side, memory in tqdm(work, desc=f"ppo, {sides.mode}", unit="run", disable=not progress):
        if "error" in row[side]:
            continue
        found = child(side, replace(sides, memory=memory, steps=2 if memory else sides.steps), *start[side])
        row["versions"] |= found.get("versions", {})
        if "error" in found:
            row[side] = {"error": found["error"]}
        elif memory:
            row[side]["peak"] = found["peak"]
        else:
            seconds[side] += found["seconds"]
            row[side]["seconds"] = seconds[side]
            row[side]["samples_per_second"] = sides.prompts / statistics.median(seconds[side])
    rates = [row[side].get("samples_per_second") for side in ("ours", "trl")]
    peaks = [row[side].get("peak") for side in ("ours", "trl")]
    row["faster"] = rates[0] / rates[1] if all(rates) else None
    row["less_memory"] = peaks[1] / peaks[0] if all(peaks) else None
    return row


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    sides, here = report["sides"], report["machine"]
    lines = [
        "# Our PPO loop beside TRL 1.12's",
        "",
        f"    {report['command']}",
        "",
        f"{here['date']}, {here['name']}, {count(here['threads'], 'thread')}, commit "
        f"{here['commit'][:12]}. {report['model']}, {sides['dtype']}; {sides['prompts']} prompts x "
        f"({sides['prompt_tokens']} + {sides['response_tokens']} tokens, all of full length), {sides['epochs']} epochs "
        f"of {sides['minibatches']} minibatches, micro-batches of {sides['micro_rows']} samples. Ours: critic and "
        f"{sides['heads']} reward heads on the policy's trunk. TRL: a value model and a reward model beside it, and in "
        "mode full a reference. Samples a second: median over steps, the first of each process left out. Peak: of "
        "tensors, as torch's allocator reports them, over two steps from before the models are made.",
        "",
        "| mode | samples/s, ours | TRL | ratio | peak MiB, ours | TRL | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        rates = [_number(row[side].get("samples_per_second"), 1) for side in ("ours", "trl")]
        peaks = [_number(row[side].get("peak"), 2**20) for side in ("ours", "trl")]
        ratios = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("faster", "less_memory")]
        lines.append(
            f"| {row['mode']} | {rates[0]} | {rates[1]} | {ratios[0]} | {peaks[0]} | {peaks[1]} | {ratios[1]} |"
        )
    notes = [
        f"{row['mode']}, {side}: {row[side]['error']}" for row in report["rows"] for side in ("ours", "trl")
        if "error" in row[side]
    ]  # fmt: skip
    versions = ", ".join(f"{k} {v}" for row in report["rows"][-1:] for k, v in row["versions"].items())
    return "\n".join([*lines, "", *notes, f"{versions}.", ""])


def _number(value: float | None, unit: float) -> str:
    return "not measured" if value is None else f"{value / unit:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if both sides ran, else 1. The ratios do not change it: the reader judges them."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="", help="folder of a causal language model (default: a small random Llama)")
    flags.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL 1.12 (default: this)")
    flags.add_argument("--trl-path", default="", help="a folder with TRL 1.12, put first on the path")
    flags.add_argument("--mode", action="append", choices=MODES, help="only this mode; repeatable")
    flags.add_argument("--rounds", type=int, default=2, help="processes for each side and mode (default %(default)s)")
    for name in SIZES:
        help_text = "(default %(default)s)"
        flags.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Sides, name), help=help_text)
    flags.add_argument("--out", type=Path, default=Path("runs/ppo_trl"), help="folder of the results")
    flags.add_argument("--quiet", action="store_true", help="no progress bar")
    given = flags.parse_args(argv)
    if given.steps < 2:
        raise ValueError(f"steps: expected at least 2, of which the first is not counted, got {given.steps}")
    sizes = {name: getattr(given, name) for name in SIZES}
    sides = Sides(model=given.model, shape=() if given.model else tuple(SMALL.items()), **sizes)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "ppo_trl.json"
    shown = {**asdict(sides), "model": Path(sides.model).name, "mode": ""}
    modes = given.mode or MODES
    kept = []
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["sides"] == json.loads(json.dumps(shown)):
            kept = [row for row in before["rows"] if row["mode"] not in modes]
    model = Path(sides.model).name or "random Llama, 5 layers of width 64"
    command = f"python -m prudent.bench.ppo_trl --trl-path TRL --model {Path(sides.model).name or chr(34) * 2}"
    report: dict[str, Any] = {"command": command, "model": model, "sides": shown, "rows": kept,
                              "machine": asdict(machine.describe("cpu", quick=True))}  # fmt: skip
    for mode in modes:
        row = compare(replace(sides, mode=mode), (given.trl_python, given.trl_path), given.rounds, not given.quiet)
        report["rows"] = sorted([*report["rows"], row], key=lambda r: MODES.index(r["mode"]))
        file.write_text(json.dumps(report, indent=1), encoding="utf-8")
        (given.out / "ppo_trl.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    return int(any("error" in row[side] for row in report["rows"] for side in ("ours", "trl")))


if __name__ == "__main__":
    sys.exit(main())
