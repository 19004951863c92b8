"""`gpu_check`: its goals, stages and report, also if a stage cannot run, and a dry run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from prudent.bench import gpu_check, gpu_goals, gpu_stages
from prudent.bench.gpu_check import ROOT, Check

OPS = ["ensemble_reward", "linear_logprob", "advantages", "preference_step"]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path, dry=True, minutes=5)


def test_every_goal_names_a_case_that_is_timed_and_they_come_first() -> None:
    names = [case.name for case in gpu_stages.timed_cases(dry=False)]
    goals = {goal.case for goal in gpu_goals.GOALS}
    assert set(names[: len(goals)]) == goals


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
    assert found["forward with norm: torch.compile (the faster of its two modes) takes", "2.90x"] == "does not hold"
    assert found["forward with norm: eager takes", "8.00x"] == "holds"
    assert found["256 last tokens: launches", "2"] == "does not hold"
    assert found["256 last tokens: device time", "11.9 µs"] == "holds"
    assert found["backward: share of the measured read bandwidth at the bytes' floor", "not measured"] == "not measured"


def test_linear_logprobs_memory_is_of_the_logits_and_a_peer_that_is_not_there_is_not_measured() -> None:
    case = next(goal.case for goal in gpu_goals.GOALS if goal.case.startswith("linear_logprob"))
    logits = 16384 * 128256 * 4
    rows = [row(case, memory={"ours": logits // 50}, ratio={"eager": 0.8, "liger": 1.25})]
    found = [(v["measured"], v["verdict"]) for v in gpu_goals.verdicts(rows) if v["claim"].startswith("linear_logprob")]
    assert found == [
        ("2.0 %", "holds"), ("1.25x", "does not hold"), ("0.80x", "holds"), ("not measured", "not measured"),
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
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert check.stage_tests(10) == ("failed", [gpu_check._CARRY])
    assert "wheels of pytest" in gpu_check._CARRY


def test_an_op_whose_correctness_failed_is_not_timed(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    check.report["machine"], check.cases = {"name": "some GPU"}, [("good", "good, forward"), ("bad", "bad, forward")]
    check.failed = {"bad"}
    asked: list[Any] = []

    def child(stage: str, limit: float, before: Any, *flags: str) -> tuple[int, Any]:
        asked.append(flags[flags.index("--cases") + 1 :])
        return 0, {"notes": [], "failed": [], "rows": [row("good, forward")]}

    monkeypatch.setattr(check, "child", child)
    status, notes = check.stage_timing(10)
    assert asked == [("good, forward",)]
    assert (status, notes) == ("failed", ["bad: not timed, its correctness failed"])


def test_a_case_that_takes_its_process_down_is_named_and_the_rest_are_timed(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    check.report["machine"], check.cases = {"name": "some GPU"}, [("op", "a"), ("op", "b"), ("op", "c")]
    answers = iter([
        (139, {"notes": ["exit code 139: illegal access"], "failed": [], "rows": [row("a")], "running": "b"}),
        (0, {"notes": [], "failed": [], "rows": [row("c")], "running": None}),
    ])  # fmt: skip
    monkeypatch.setattr(check, "child", lambda *arguments: next(answers))
    status, notes = check.stage_timing(10)
    assert [r["name"] for r in check.report["rows"]] == ["a", "c"]
    assert (status, notes) == ("failed", ["b: exit code 139: illegal access"])


def test_cases_without_time_left_are_counted(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    check.report["machine"], check.cases = {"name": "some GPU"}, [("op", "a"), ("op", "b"), ("op", "c")]
    late = (None, {"notes": ["out of time"], "failed": [], "rows": [row("a")], "running": "b"})
    monkeypatch.setattr(check, "child", lambda *arguments: late)
    assert check.stage_timing(10) == ("failed", ["out of time: 2 cases not measured, the first b"])


def sanitized(
    check: Check, monkeypatch: pytest.MonkeyPatch, canary: int, found: dict[str, int]
) -> tuple[str, list[str]]:
    """stage_sanitizer on a machine whose compute-sanitizer exits with these codes."""
    check.dry, check.cases = False, [("ensemble_reward", "forward"), ("advantages", "GAE")]
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/compute-sanitizer")
    monkeypatch.setattr(check, "call", lambda command, limit: (canary, "Device not supported"))

    def child(stage: str, limit: float, before: list[str]) -> tuple[int, Any]:
        assert before[before.index("--report-api-errors") + 1] == "no"
        return found[before[-1]], {"notes": ["said"], "failed": [], "rows": []}

    monkeypatch.setattr(check, "child", child)
    return check.stage_sanitizer(10)


def test_a_sanitizer_that_cannot_run_fails_no_op(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    said = sanitized(check, monkeypatch, 1, {})
    assert said == ("passed", ["compute-sanitizer does not run here: Device not supported"])
    assert check.failed == set()


def test_a_bad_access_fails_every_op_and_a_race_is_only_reported(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitized(check, monkeypatch, 0, {"memcheck": 0, "racecheck": 9})[0] == "failed"
    assert check.failed == set()
    assert sanitized(check, monkeypatch, 0, {"memcheck": 9, "racecheck": 0})[0] == "failed"
    assert check.failed == {"ensemble_reward", "advantages"}


def test_the_report_has_times_or_the_failed_check_of_each_case() -> None:
    failed = row("wrong op", timings={}, check={"passed": False}, notes=["far off"])
    fine = row("fine", bandwidth_share=0.5, memory={"ours": 2**20}, host={"ours": 1.2e-4})
    lines = [gpu_goals._case_line(r) for r in (fine, failed)]
    assert lines == [
        "| fine | 1000.0 µs | 120.0 µs |  | 50.0 % |  | 1.0 MiB |", "| wrong op | check failed | | | | far off | |",
    ]  # fmt: skip


def test_every_op_with_triton_kernels_has_cases_to_run_on_the_device() -> None:
    files = gpu_check.test_files()
    assert set(files) == set(OPS)
    for found in files.values():
        assert found[0].endswith("triton_cases.py")
        assert gpu_check.first_tests(found[0])


def test_a_test_file_that_names_the_device_is_run_on_it() -> None:
    kernels = ROOT / "tests" / "kernels"
    aware = {str(f.relative_to(ROOT)) for f in kernels.glob("*/test_*.py") if "DEVICE" in f.read_text(encoding="utf-8")}
    assert "tests/kernels/linear_logprob/test_values.py" in aware
    assert aware <= {file for found in gpu_check.test_files().values() for file in found}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run it without --dry")
def test_a_dry_run_goes_from_end_to_end_in_a_checkout_of_any_name(tmp_path: Path) -> None:
    script = ROOT / "bench" / "gpu_check.py"
    stages = ["build", "machine", "tests", "timing"]
    command = [sys.executable, str(script), "--dry", "--minutes", "8", "--out", str(tmp_path), "--stages", *stages]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
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
