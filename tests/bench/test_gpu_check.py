"""`gpu_check`: its goals, stages and report, also if a stage cannot run, and a dry run from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prudent.bench import cases, gpu_check, gpu_goals, gpu_stages, gpu_tests, gpu_timing
from prudent.bench.case import Work
from prudent.bench.gpu_check import ROOT, Check

OPS = ["ensemble_reward", "linear_logprob", "advantages", "preference_step"]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path, dry=True, minutes=5)


def test_the_forward_with_norm_is_timed_first_and_every_goal_before_the_rest() -> None:
    first = [timed.key for timed in gpu_timing.plan(dry=False, goals=True)]
    assert first[0] == "ensemble_reward, forward, norm, 65536 x 4096, bf16"
    assert first[: len(gpu_goals.goal_cases())] == gpu_goals.goal_cases()
    rest = [timed.key for timed in gpu_timing.plan(dry=False, goals=False)]
    assert not set(first) & set(rest)
    assert {case.name for case in cases.select("cuda", "full")} <= {*first, *rest}


def test_what_may_take_long_or_end_the_process_is_timed_after_every_goal_had_its_first_turn() -> None:
    work = Work([()], {"ours": len, "eager": len, "compiled": len, "autotuned": len, "cce": len, "verl": len}, len)

    def variants(keys: list[gpu_timing.Timed]) -> list[set[str]]:
        return [set(t.case.make(torch.device("cpu")).variants) for t in keys]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_timing.cases, "CASES", tuple(replace(c, make=lambda device: work) for c in cases.CASES))
        patch.setattr(gpu_timing, "_backward_work", lambda *shape: work)
        found = gpu_timing.plan(dry=False, goals=True)
    first, second = found[: len(gpu_goals.goal_cases())], found[len(gpu_goals.goal_cases()) :]
    assert all(names == {"ours", "eager", "compiled"} for names in variants(first))
    assert {t.case.op: names for t, names in zip(second, variants(second), strict=True)} == {
        "ensemble_reward": {"ours", "eager", "compiled", "autotuned", "cce", "verl"},
        "linear_logprob": {"ours", "eager", "compiled", "cce", "verl"},
    }


def row(name: str, **fields: Any) -> dict[str, Any]:
    plain = {"name": name, "ratio": {}, "memory": {}, "timings": {"ours": {"median": 1e-3}}, "notes": [], "check": None}
    return {**plain, **fields}


def test_a_goal_holds_does_not_hold_or_was_not_measured() -> None:
    rows = [
        row(gpu_goals.GOALS[0].case, bandwidth_share=0.91, ratio={"compiled": 3.5, "autotuned": 2.9, "eager": 8.0}),
        row(gpu_goals.LAST, kernels=2, device_us=11.94, ratio={"eager": 9.0}),
    ]
    found = {(v["claim"], v["measured"]): v["verdict"] for v in gpu_goals.verdicts(rows)}
    assert found["forward with norm: share of the measured read bandwidth", "91.0 %"] == "holds"
    assert found["forward with norm: torch.compile takes", "3.50x"] == "holds"
    assert found["forward with norm: torch.compile with max-autotune takes", "2.90x"] == "does not hold"
    assert found["forward with norm: eager takes", "8.00x"] == "holds"
    assert found["256 last tokens: launches", "2"] == "does not hold"
    assert found["256 last tokens: device time", "11.9 µs"] == "holds"
    assert found["backward: share of the measured read bandwidth at the bytes' floor", "not measured"] == "not measured"


def test_linear_logprobs_memory_is_of_the_logits_and_a_peer_that_is_not_there_is_not_measured() -> None:
    case = next(goal.case for goal in gpu_goals.GOALS if goal.case.startswith("linear_logprob"))
    logits = 16384 * 128256 * 4
    rows = [row(case, memory={"ours": logits // 50}, ratio={"eager": 0.8, "liger": 1.25})]
    found = [
        (v["measured"], v["verdict"]) for v in gpu_goals.verdicts(rows) if v["claim"].startswith("linear_logprob:")
    ]
    assert found == [
        ("2.0 %", "holds"), ("1.25x", "does not hold"), ("0.80x", "holds"), ("not measured", "not measured"),
        ("not measured", "not measured"),
    ]  # fmt: skip


@pytest.mark.parametrize("stage", [gpu_stages.determinism, gpu_stages.graphs, gpu_stages.small])
def test_every_op_passes_each_stage_of_correctness(stage: Any, tmp_path: Path) -> None:
    result = gpu_stages.Result(tmp_path / "result.json")
    stage(result, torch.device("cpu"), True)
    assert result.content["notes"] == [f"{op}: holds" for op in OPS]
    assert json.loads((tmp_path / "result.json").read_text())["failed"] == []


def test_what_changes_from_run_to_run_or_ignores_its_seed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(1000))
    ops = {
        "restless": (lambda device, seed: lambda: [torch.tensor(next(count))], True),
        "deaf": (lambda device, seed: lambda: [torch.tensor(1)], True),
        "lost": (lambda device, seed: lambda: [torch.tensor(float("nan"))], True),
        "broken": (lambda device, seed: lambda: [][0], True),
    }
    monkeypatch.setattr(gpu_stages, "OPS", ops)
    result = gpu_stages.Result(tmp_path / "result.json")
    gpu_stages.determinism(result, torch.device("cpu"), True)
    assert result.content["notes"] == [
        "restless: run 2 of 3 has other bits, or a value that is not finite", "deaf: holds",
        "lost: run 2 of 3 has other bits, or a value that is not finite", "broken: IndexError: list index out of range",
    ]  # fmt: skip
    gpu_stages.graphs(result, torch.device("cpu"), True)
    assert "deaf: a new seed does not change a replay" in result.content["notes"]
    assert "lost: a value is not finite" in result.content["notes"]
    assert result.content["failed"] == ["restless", "lost", "broken", "deaf"]


def test_a_command_is_ended_at_its_limit_with_all_it_started(check: Check) -> None:
    began = time.monotonic()
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert check.call([sys.executable, "-c", sleeper], 1.0)[0] is None
    assert time.monotonic() - began < 20
    assert check.call([sys.executable, "-c", "print('never run')"], 0.0) == (None, "")


def test_a_stage_that_fails_does_not_hide_the_next_and_both_are_in_the_report(check: Check) -> None:
    def broken(limit: float) -> tuple[str, list[str]]:
        raise OSError("no such thing")

    check.stage_build = broken  # type: ignore[method-assign]
    check.stage_graphs = lambda limit: ("passed", ["holds"])  # type: ignore[method-assign]
    check.run("build")
    check.run("graphs")
    report = json.loads((check.out / "gpu_check.json").read_text())
    assert {name: stage["status"] for name, stage in report["stages"].items()} == {
        "build": "failed",
        "graphs": "passed",
    }
    assert "OSError: no such thing" in (check.out / "gpu_check.md").read_text()


def test_without_pytest_the_wheels_to_carry_are_named(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    assert check.stage_tests(10) == ("failed", [gpu_tests.NO_PYTEST])
    assert "wheels of pytest" in gpu_tests.NO_PYTEST


def answering(check: Check, monkeypatch: pytest.MonkeyPatch, *answers: tuple[int | None, dict[str, Any]]) -> list[Any]:
    """Let the check's children give these answers in turn; the list gets each child's flags."""
    asked: list[Any] = []
    turns = iter(answers)

    def child(stage: str, limit: float, before: Any = (), *flags: str) -> tuple[int | None, Any]:
        asked.append(flags)
        code, found = next(turns)
        found = {"notes": [], "failed": [], "rows": [], **found}
        check.add(found)
        return code, found

    monkeypatch.setattr(check, "child", child)
    return asked


def test_an_op_that_is_not_steady_is_left_out_of_timing_but_not_of_the_goals(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(
        check, monkeypatch, (0, {"notes": ["bad: run 2 has other bits"], "failed": ["bad"]}), (0, {}), (0, {})
    )
    assert check.stage_determinism(10)[0] == "failed"
    assert check.stage_timing(10) == ("failed", ["bad: not timed, it failed determinism or graphs"])
    assert check.stage_goals(10) == ("passed", [])
    assert asked[1:] == [("--skip", "--without", "bad"), ("--skip", "--without")]


def test_a_failed_test_or_sanitizer_does_not_keep_an_op_from_being_timed(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tests, "_pytest", lambda *arguments: ("1 passed, 1 failed, 0 skipped", False))
    assert check.stage_tests(10)[0] == "failed"
    answering(check, monkeypatch, (0, {"failed": ["advantages"]}), (0, {"rows": [row("a")], "done": ["a"]}))
    assert check.stage_sanitizer(10)[0] == "failed"
    assert check.stage_timing(10) == ("passed", [])


def test_a_case_that_takes_its_process_down_is_named_and_the_rest_are_timed(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = [["op", "a"], ["op", "b"], ["op", "c"]]
    crash = {
        "notes": ["exit code 139: illegal access"],
        "rows": [row("a")],
        "todo": todo,
        "done": ["a"],
        "running": "b",
    }
    asked = answering(check, monkeypatch, (139, crash), (0, {"rows": [row("c")], "done": ["c"]}))
    status, notes = check.stage_goals(10)
    assert [r["name"] for r in check.report["rows"]] == ["a", "c"]
    assert (status, notes) == ("failed", ["b: exit code 139: illegal access"])
    assert asked[1][:3] == ("--skip", "a", "b")


def test_cases_without_time_left_are_counted(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [["op", "a"], ["op", "b"], ["op", "c"]]
    late = {"notes": ["out of time"], "rows": [row("a")], "todo": todo, "done": ["a"], "running": "b"}
    answering(check, monkeypatch, (None, late))
    assert check.stage_timing(10) == ("failed", ["out of time: 2 cases not measured, the first b"])


def test_a_second_time_that_fails_does_not_take_the_first_away(check: Check) -> None:
    check.add({"rows": [row("a", ratio={"eager": 2.0})]})
    check.add({"rows": [row("a", timings={})]})
    assert check.report["rows"][0]["ratio"] == {"eager": 2.0}
    check.add({"rows": [row("a", ratio={"eager": 2.1, "cce": 1.5})]})
    assert [r["ratio"] for r in check.report["rows"]] == [{"eager": 2.1, "cce": 1.5}]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the dry run is a CPU's")
def test_a_killed_run_keeps_the_cases_that_it_had(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prudent.bench.gpu_check", "--dry", "--goals-only", "--out", str(tmp_path)]
    quick = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}  # torch.compile then refuses, which a run survives
    run = subprocess.Popen(command, env=quick, stdout=subprocess.DEVNULL)
    file, end = tmp_path / "gpu_check.json", time.monotonic() + 300
    while time.monotonic() < end and not (file.exists() and json.loads(file.read_text())["rows"]):
        time.sleep(0.2)
    child = int(subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()[0])
    run.kill()
    run.wait()
    os.killpg(child, signal.SIGKILL)  # as the end of a lease does
    report = json.loads(file.read_text())
    assert report["rows"][0]["name"] == "ensemble_reward, forward, norm, 64 x 256, bf16"
    assert report["rows"][0]["timings"]["ours"]["median"] > 0
    assert report["machine"]["name"]
    assert report["rows"][0]["name"] in (tmp_path / "gpu_check.md").read_text()
    assert "gpu_stages goals" in (tmp_path / "gpu_check.log").read_text()


def sanitized(
    check: Check, monkeypatch: pytest.MonkeyPatch, canary: int, found: dict[str, int]
) -> tuple[str, list[str]]:
    """stage_sanitizer on a machine whose compute-sanitizer exits with these codes."""
    check.dry = False
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/compute-sanitizer")
    monkeypatch.setattr(check, "call", lambda command, limit: (canary, "Device not supported"))

    def child(stage: str, limit: float, before: list[str]) -> tuple[int, Any]:
        assert before[before.index("--report-api-errors") + 1] == "no"
        return found[before[-1]], {"notes": ["said"], "failed": [], "rows": []}

    monkeypatch.setattr(check, "child", child)
    return check.stage_sanitizer(10)


def test_a_sanitizer_that_cannot_run_is_no_failure(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    said = sanitized(check, monkeypatch, 1, {})
    assert said == ("passed", ["compute-sanitizer does not run here: Device not supported"])


def test_a_finding_of_either_tool_fails_the_stage(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitized(check, monkeypatch, 0, {"memcheck": 0, "racecheck": 9})[0] == "failed"
    assert sanitized(check, monkeypatch, 0, {"memcheck": 9, "racecheck": 0})[0] == "failed"
    assert sanitized(check, monkeypatch, 0, {"memcheck": 0, "racecheck": 0})[0] == "passed"


def test_the_report_has_times_or_the_failed_check_of_each_case() -> None:
    failed = row("wrong op", timings={}, check={"passed": False}, notes=["far off"])
    fine = row("fine", bandwidth_share=0.5, memory={"ours": 2**20}, host={"ours": 1.2e-4})
    lines = [gpu_goals._case_line(r) for r in (fine, failed)]
    assert lines == [
        "| fine | 1000.0 µs | 120.0 µs |  | 50.0 % |  | 1.0 MiB |", "| wrong op | check failed | | | | far off | |",
    ]  # fmt: skip


def test_every_op_with_triton_kernels_has_cases_to_run_on_the_device() -> None:
    files = gpu_tests.test_files()
    assert set(files) == set(OPS)
    for found in files.values():
        assert found[0].endswith("triton_cases.py")
        assert gpu_tests.first_tests(found[0])


def test_a_test_file_that_names_the_device_is_run_on_it() -> None:
    kernels = ROOT / "tests" / "kernels"
    aware = {str(f.relative_to(ROOT)) for f in kernels.glob("*/test_*.py") if "DEVICE" in f.read_text(encoding="utf-8")}
    assert "tests/kernels/linear_logprob/test_values.py" in aware
    assert aware <= {file for found in gpu_tests.test_files().values() for file in found}


@pytest.mark.parametrize(("arguments", "said"), [([], "the first call"), (["goals"], "usage: bench/gpu.sh goals OUT")])
def test_the_script_of_the_two_calls_explains_itself(arguments: list[str], said: str) -> None:
    done = subprocess.run(["bash", str(ROOT / "bench" / "gpu.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run it without --dry")
def test_a_dry_run_goes_from_end_to_end_in_a_checkout_of_any_name(tmp_path: Path) -> None:
    script = ROOT / "bench" / "gpu_check.py"
    stages = ["build", "goals", "tests", "timing"]
    command = [sys.executable, str(script), "--dry", "--minutes", "25", "--out", str(tmp_path), "--stages", *stages]
    quick = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=quick, capture_output=True, text=True, timeout=1500)
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    said = json.dumps(report["stages"], indent=1) + done.stdout + done.stderr
    assert done.returncode == 0, said
    assert {name: stage["status"] for name, stage in report["stages"].items()} == dict.fromkeys(stages, "passed"), said
    assert {row["op"] for row in report["rows"]} == set(OPS)
    assert {goal["verdict"] for goal in report["goals"]} == {"not measured"}
    assert report["dry"] is True
    text = (tmp_path / "gpu_check.md").read_text()
    assert "nothing here is a GPU's number" in text
    assert "read bandwidth:" not in text
    assert {row["bandwidth_share"] for row in report["rows"]} == {None}
    assert report["machine"]["bandwidth"] is None
    assert "| 256 last tokens: device time | at most 12.0 µs | not measured | not measured |" in text
