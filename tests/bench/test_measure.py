"""The microbenchmarks: measurements are right, a wrong op gets no times, and written results can be read again."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prudent.bench import __main__ as command
from prudent.bench import cases, compare, machine, measure, report
from prudent.bench.case import Case, Check, Work, judge, relative_error
from prudent.bench.ops import ensemble_reward

DEVICE = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def here() -> machine.Machine:
    return machine.describe("cpu", quick=True)


def toy(wrong: bool = False, broken: str = "") -> Case:
    """x -> 2 x for 256 numbers: with `wrong`, ours is off by one in the last; the variant `broken` raises."""
    x = torch.arange(256, dtype=torch.float32)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def ours(x: torch.Tensor) -> torch.Tensor:
        result = x + x
        return torch.cat([result[:-1], result[-1:] + 1]) if wrong else result

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"{broken} is not here\nand this is its story")

    def make(device: torch.device) -> Work:
        variants = {"ours": ours, "eager": double, **({broken: fails} if broken else {})}
        wide = x.double() * 2
        return Work([(x,)], variants, lambda: judge({"y": (relative_error(ours(x), wide), 0.0)}))

    return Case("toy", "double", "256", "fp32", "smoke", 2 * 4 * 256, 256, make)


def test_every_case_at_smoke_size_passes_its_check() -> None:
    chosen = cases.select("cpu", "smoke")
    assert {case.op for case in chosen} == set(cases.ops())
    for case in chosen:
        check = case.make(DEVICE).check()
        assert check.passed, (case.name, check)
        assert check.error < check.bound


def test_names_are_unique_and_every_op_has_every_dtype() -> None:
    for size in ("smoke", "small", "full"):
        chosen = cases.select("cpu", size)
        assert len({case.name for case in chosen}) == len(chosen)
        assert {(case.op, case.dtype) for case in chosen} >= {(op, "fp32") for op in cases.ops()}


def test_a_run_writes_json_csv_markdown_and_picture_that_agree(tmp_path: Path, here: machine.Machine) -> None:
    chosen = [case for case in cases.select("cpu", "smoke") if case.op == "ensemble_reward" and case.dtype == "bf16"]
    rows = measure.run(chosen[:1], "cpu", "smoke", progress=False)
    written = report.write(rows, here, tmp_path)
    assert [path.name for path in written][:3] == ["ops-cpu.json", "ops-cpu.csv", "ops-cpu.md"]
    (row,) = rows
    assert set(row.timings) == {"ours", "eager", "compiled", "F.linear"}
    assert all(0 < t.q20 <= t.median <= t.q80 and t.rounds >= 5 for t in row.timings.values())
    with written[1].open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == list(row.timings)
    assert float(lines[1]["times_ours"]) == pytest.approx(row.timings["eager"].median / row.timings["ours"].median)
    assert all(line["commit"] == here.commit and line["check"] == "passed" for line in lines)
    assert "ensemble_reward: forward, norm" in written[2].read_text(encoding="utf-8")
    assert all(path.stat().st_size > 1000 for path in written[3:])
    assert row.share() == pytest.approx(row.bytes_moved / row.timings["ours"].median / row.bandwidth)
    loaded, machine_again = report.load(written[0])
    assert loaded == rows
    assert machine_again == here


def test_a_wrong_op_gets_no_times(tmp_path: Path, here: machine.Machine) -> None:
    rows = measure.run([toy(wrong=True), toy()], "cpu", "smoke", progress=False)
    assert not rows[0].passed
    assert rows[0].timings == rows[0].memory == rows[0].samples == {}
    assert rows[0].ratio("eager") is None
    assert rows[1].timings
    text = report.table(rows, here)
    assert "check failed" in text
    assert "y is 0.00196 from fp64" in text
    csv_lines = report.to_csv(rows, here).splitlines()
    assert ",ours,check failed,,,,,," in csv_lines[1]
    assert report.load(report.write(rows, here, tmp_path)[0])[0] == rows


def test_an_op_that_gives_nan_fails_its_check_and_json_can_say_so(tmp_path: Path, here: machine.Machine) -> None:
    assert relative_error(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0])) == math.inf
    assert relative_error(torch.ones(2, 1), torch.ones(2)) == math.inf
    row = replace(measure.run([toy()], "cpu", "smoke", progress=False)[0], timings={}, samples={})
    row.check = Check(False, "y", math.inf, 0.0, 1e-6)
    loaded, _ = report.load(report.write([row], here, tmp_path)[0])
    assert loaded[0].check == row.check


def test_the_worst_output_is_the_one_shown() -> None:
    check = judge({"fine": (1e-7, 1e-7), "bad": (1e-2, 1e-3), "worse for its bound": (1e-2, 1e-4)})
    assert (check.passed, check.output) == (False, "worse for its bound")
    assert judge({"twice eager's": (2e-3, 1e-3)}).passed
    assert not judge({"three times": (3e-3, 1e-3)}).passed


def test_a_variant_that_cannot_run_is_left_out_with_its_reason(here: machine.Machine) -> None:
    (row,) = measure.run([toy(broken="liger")], "cpu", "smoke", progress=False)
    assert set(row.timings) == {"ours", "eager"}
    assert row.notes == ["liger: RuntimeError: liger is not here"]
    (row,) = measure.run([toy(broken="ours")], "cpu", "smoke", progress=False)
    assert row.timings == {}
    assert "not measured" in report.table([row], here)


def test_variants_take_turns_and_no_one_is_always_first() -> None:
    order: list[str] = []
    calls: dict[str, Any] = dict.fromkeys("abc")

    def sample(name: str) -> float:
        order.append(name)
        return 1.0

    samples = measure._rounds(calls, sample, seconds=0.0)
    assert {len(s) for s in samples.values()} == {measure.ROUNDS[0]}
    assert "".join(order[:9]) == "abcbcacab"


def test_every_goal_on_a_gpu_names_a_case_that_is_measured() -> None:
    goals = pytest.importorskip("prudent.bench.gpu_goals")
    names = {case.name for case in cases.select("cuda", "full")}
    assert set(goals.goal_cases()) - names == {goals.BACKWARD}  # which gpu_timing adds


def test_bytes_of_a_forward_counted_by_hand() -> None:
    # [64, 256] bf16 and a bf16 [10, 256] weight and [256] norm read, 10 fp32 biases; 64 rewards, 2 x 64 x 5, one sum
    by_hand = 64 * 256 * 2 + 10 * 256 * 2 + 256 * 2 + 10 * 4 + (64 + 640 + 1) * 4
    assert ensemble_reward.forward_bytes(64, 256, "bf16", norm=True) == by_hand
    case = next(
        c for c in cases.select("cpu", "smoke", ["ensemble_reward"]) if (c.mode, c.dtype) == ("forward, norm", "bf16")
    )
    assert case.bytes_moved == by_hand
    assert case.flops == 2 * 64 * 256 * 10


def test_extra_memory_is_the_peak_less_what_is_returned() -> None:
    x = torch.ones(1000, 256)
    assert measure.extra_memory(lambda: x + x, DEVICE) == 0
    assert measure.extra_memory(lambda: (x + x) * x, DEVICE) == x.nbytes
    assert measure.extra_memory(lambda: ((x + x) * x).sum(), DEVICE) == 2 * x.nbytes - 4  # the sum comes after it
    assert measure.extra_memory(lambda: F.relu(x)[:1], DEVICE) == 0  # the view keeps all of it


def test_the_table_fits_a_terminal_of_120_columns(here: machine.Machine) -> None:
    longest = replace(measure.run([toy()], "cpu", "smoke", progress=False)[0], mode="forward + backward, norm")
    longest.shape, longest.timings["F.linear"] = "16384 x 4096 x 128256", longest.timings["eager"]
    longest.timings["autotuned"] = longest.timings["compiled"] = longest.timings["eager"]
    longest.memory = dict.fromkeys(longest.memory, 123_456_789)
    assert max(map(len, report.table([longest], here).splitlines())) <= 120


def test_compare_marks_only_what_leaves_both_ranges(
    tmp_path: Path, here: machine.Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(name: str, median: float) -> measure.Row:
        timing = measure.Timing(median, median * 0.95, median * 1.05, 9, 1)
        eager = measure.Timing(1.0, 1.0, 1.0, 9, 1)
        check = Check(True, "y", 0.0, 0.0, 1e-6)
        return measure.Row(name, "toy", "m", "s", "fp32", "cpu", 8, 8, 1e9, check, {"ours": timing, "eager": eager})

    other = replace(here, name="another processor")
    for folder, machine_of, rows in (
        ("old", here, [row("a", 0.1), row("b", 0.1), row("gone", 0.1)]),
        ("new", other, [row("a", 0.05), row("b", 0.105), row("added", 0.1)]),
    ):
        report.write(rows, machine_of, tmp_path / folder)
    assert compare.main([str(tmp_path / "old/ops-cpu.json"), str(tmp_path / "new/ops-cpu.json")]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "faster" in lines["a"]
    assert "0.50" in lines["a"]
    assert "slower" not in lines["b"]
    assert "absent" in lines["gone"]
    assert "absent" in lines["added"]
    assert "machines differ" in " ".join(lines.values())


@pytest.mark.parametrize(
    "content", [None, "", "[1]", "{}", '{"schema": 1}', '{"schema": 1, "rows": [{}], "machine": {}}']
)
def test_compare_refuses_a_broken_file_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    file = tmp_path / "broken.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert compare.main([str(file), str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare: error: {file}: expected the JSON file of a `make bench`")
    assert error.count("\n") == 1


def test_a_run_in_pieces_adds_up_and_keeps_to_one_commit(tmp_path: Path, here: machine.Machine) -> None:
    (row,) = measure.run([toy()], "cpu", "smoke", progress=False)
    path = report.write([row, replace(row, name="another")], here, tmp_path)[0]
    faster = replace(here, bandwidth=2 * here.bandwidth)
    rows, both = report.merged(path, [replace(row, mode="new")], faster)
    assert [(r.name, r.mode) for r in rows] == [(row.name, "new"), ("another", row.mode)]
    assert both.bandwidth == faster.bandwidth
    assert report.merged(tmp_path / "none.json", [row], here) == ([row], here)
    with pytest.raises(ValueError, match="expected results of commit aaaa and this machine to add to"):
        report.merged(path, [row], replace(here, commit="aaaa"))


def test_adding_to_another_commits_results_is_refused_before_anything_is_measured(
    tmp_path: Path, here: machine.Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    report.write([], replace(here, commit="aaaa"), tmp_path)
    assert command.main(["--size=smoke", "--device=cpu", f"--out={tmp_path}", "--add"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: error: ")
    assert error.count("\n") == 1


def test_a_checkout_copied_without_its_history_can_name_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_git", lambda *arguments: "")
    monkeypatch.delenv("PRUDENT_COMMIT", raising=False)
    assert machine.revision() == ("unknown", True)
    monkeypatch.setenv("PRUDENT_COMMIT", "b" * 40)
    assert machine.revision() == ("b" * 40, False)


def test_an_unknown_op_or_size_is_refused() -> None:
    with pytest.raises(ValueError, match="bench: op: expected one of ensemble_reward"):
        cases.select("cpu", "small", ["nonsense"])
    with pytest.raises(ValueError, match="bench: size: expected one of smoke, small, full, got 'big'"):
        cases.select("cpu", "big")


def test_the_command_lists_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--device", "cpu", "--op", "ensemble_reward", "--dtype", "bf16"]) == 0
    assert "ensemble_reward, forward, norm, 8192 x 4096, bf16" in capsys.readouterr().out.splitlines()
    assert command.main(["--list", "--device", "cpu", "--case", "few rows", "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out == "ensemble_reward, few rows, norm, 16 x 4096, fp32\n"


def test_a_selection_without_a_case_is_refused_and_leaves_earlier_results_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ops-cpu.json").write_text("earlier")
    arguments = ["--device", "cpu", "--op", "advantages", "--case", "nope", "--out", str(tmp_path)]
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == (
        "bench: error: no case of size small has --op advantages and --case 'nope'; --list names them\n"
    )
    assert (tmp_path / "ops-cpu.json").read_text() == "earlier"


@pytest.mark.slow
def test_make_bench_hands_the_alternating_samples_to_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    saved = tmp_path / "benchmark.json"
    arguments = ["--confcutdir=bench/suite", "bench/suite", "-pno:cacheprovider", "--benchmark-only", "-k=few and fp32"]
    options = ["--size=smoke", "--device=cpu", f"--out={tmp_path}", f"--benchmark-json={saved}", "--benchmark-quiet"]
    # without the outer run's: pytest-benchmark refuses to measure in a worker of xdist
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    quick = {**outside, "TORCH_COMPILE_DISABLE": "1"}  # torch.compile then refuses, which a run survives
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *options], cwd=ROOT, env=quick, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "few rows, norm" in done.stdout
    rows, _ = report.load(tmp_path / "ops-cpu.json")
    found = json.loads(saved.read_text(encoding="utf-8"))["benchmarks"]
    assert [b["params"]["variant"] for b in found] == ["ours", "eager"]
    assert rows[0].notes[0].startswith("compiled: ")
    assert "SKIPPED [1]" in done.stdout
    for benchmark in found:
        timing = rows[0].timings[benchmark["params"]["variant"]]
        assert benchmark["stats"]["median"] == pytest.approx(timing.median)
        assert benchmark["stats"]["rounds"] == timing.rounds
