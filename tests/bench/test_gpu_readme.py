"""The README's tables of GPU goals come from the kept reports, by a command, and from a GPU's reports only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prudent.bench import gpu_check, gpu_goals, gpu_readme


def report(path: Path, rows: list[dict[str, Any]], commit: str = "a" * 40, dry: bool = False, ops: bool = True) -> Path:
    machine = {"name": "some GPU", "commit": commit, "versions": {"torch": "2.11", "triton": "3.6"}}
    content = {"dry": dry, "machine": machine, "rows": rows, **({"stages": {}} if ops else {})}
    path.write_text(json.dumps(content))
    return path


def test_the_readme_has_what_the_kept_reports_say() -> None:
    block = gpu_readme.block(sorted(gpu_readme.RESULTS.glob("gpu_*.json")))
    assert block in (gpu_readme.ROOT / "README.md").read_text(encoding="utf-8")


def test_goals_are_filled_from_all_files_and_the_others_stay_not_measured(tmp_path: Path) -> None:
    timed = {"timings": {"ours": {}}}
    files = [
        report(tmp_path / "gpu_goals.json", [{"name": gpu_goals.GOALS[0].case, "bandwidth_share": 0.93, **timed}]),
        report(tmp_path / "gpu_rest.json", [{"name": gpu_goals.LAST, "kernels": 2, **timed}]),
        report(tmp_path / "gpu_ppo.json", [{"name": "8b", "peak_gb": 39.0}], ops=False),
    ]
    block = gpu_readme.block(files)
    assert "Measured on some GPU, commit aaaaaaaaaaaa, torch 2.11, triton 3.6." in block
    assert "| forward with norm: share of the measured read bandwidth | at least 90.0 % | 93.0 % | holds |" in block
    assert "| 256 last tokens: launches | at most 1 | 2 | does not hold |" in block
    assert "whole loop: peak, GB | at most 40 | 39 | holds |" in block
    assert "| 256 last tokens: device time | at most 12.0 µs | not measured | not measured |" in block


def test_a_row_whose_check_failed_counts_as_not_measured(tmp_path: Path) -> None:
    file = report(tmp_path / "gpu_goals.json", [{"name": gpu_goals.LAST, "kernels": 1, "timings": {}}])
    assert "| 256 last tokens: launches | at most 1 | not measured | not measured |" in gpu_readme.block([file])


def test_a_dry_run_and_two_commits_are_refused(tmp_path: Path) -> None:
    dry = report(tmp_path / "gpu_dry.json", [], dry=True)
    with pytest.raises(ValueError, match="expected a report of a GPU, got a dry run's"):
        gpu_readme.block([dry])
    files = [report(tmp_path / f"gpu_{commit}.json", [], commit=commit * 40) for commit in "ab"]
    with pytest.raises(
        ValueError, match="expected results of one machine and commit, got some GPU, commit aaaaaaaaaaaa"
    ):
        gpu_readme.block(files)


def test_the_command_writes_between_the_markers_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_readme, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_readme, "RESULTS", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected the lines"):
        gpu_check.main(["--readme"])
    readme.write_text(f"before\n{gpu_readme.BEGIN}\nold\n{gpu_readme.END}\nafter\n")
    assert gpu_check.main(["--readme"]) == 0
    assert readme.read_text() == f"before\n{gpu_readme.block([])}\nafter\n"
    assert capsys.readouterr().out == "written: README.md, from no result: nothing is measured\n"
