"""The timing of the op on a CPU: an op that fails its check gets no times, and every goal is in the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent import EnsembleOutput
from prudent.bench import cpu_ensemble


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave torch.compile out, which takes seconds and is not under test."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(cpu_ensemble, "CALLS", 2)


def run(out: Path, shape: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    command = ["cpu_ensemble", "--shapes", shape, "--dtypes", "fp32", "--seconds", "0", "--out", str(out), *flags]
    monkeypatch.setattr(sys, "argv", command)
    cpu_ensemble.main()
    return out.with_suffix(".md").read_text()


def test_every_candidate_is_timed_every_goal_judged_and_a_second_run_adds_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "times", "70x32", monkeypatch)
    text = run(tmp_path / "times", "4x32", monkeypatch)
    found = json.loads((tmp_path / "times.json").read_text())
    assert list(found) == ["[70, 32] fp32", "[4, 32] fp32"]
    for goal in (*cpu_ensemble.RATES, *cpu_ensemble.OVERHEADS):
        assert f"| {goal.what} |" in text
    for record in found.values():
        assert record["failed"] == ""
        assert all(times["median"] >= times["least"] > 0 for times in record["times"].values())
        assert {"commit", "date", "machine", "torch", "threads", "isa"} <= set(record)


def test_the_distance_alone_can_be_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(tmp_path / "times", "70x64", monkeypatch, "--distance")
    assert text.count("| at most") == len(cpu_ensemble.DISTANCE)
    (record,) = json.loads((tmp_path / "times.json").read_text()).values()
    assert set(record["times"]) == {name for goal in cpu_ensemble.DISTANCE for name in (goal.first, goal.second)}


def test_the_gradients_alone_can_be_timed_and_the_allocators_settings_name_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in cpu_ensemble.ALLOCATOR:
        monkeypatch.delenv(variable, raising=False)
    run(tmp_path / "times", "70x64", monkeypatch, "--gradients")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    text = run(tmp_path / "times", "70x64", monkeypatch, "--gradients")
    assert text.count("| at least") == 2 * len(cpu_ensemble.GRADIENTS) == 8
    found = json.loads((tmp_path / "times.json").read_text())
    assert list(found) == ["[70, 64] fp32", "[70, 64] fp32, THP_MEM_ALLOC_ENABLE=1"]
    for record in found.values():
        names = {name for goal in cpu_ensemble.GRADIENTS for name in (goal.first, goal.second)}
        assert set(record["times"]) == {"fresh", *names}
        assert record["huge_pages"] in ("always", "madvise", "never", "none")


def test_a_distance_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_ensemble.ensemble_reward

    def wrong(*tensors: Tensor, **options: Any) -> EnsembleOutput:
        out = right(*tensors, **options)
        return out if out.distance is None else out._replace(distance=out.distance * 1.01)

    monkeypatch.setattr(cpu_ensemble, "ensemble_reward", wrong)
    assert "NOT TIMED, the check failed: distance of rank 0: error" in run(tmp_path / "times", "70x64", monkeypatch)


def test_an_op_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_ensemble.ours

    def wrong(hidden: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None, seed: Tensor | None = None) -> Tensor:
        return right(hidden, weight, bias, norm, seed) * 1.01

    monkeypatch.setattr(cpu_ensemble, "ours", wrong)
    text = run(tmp_path / "times", "70x32", monkeypatch)
    assert "NOT TIMED, the check failed: reward: error" in text
    assert json.loads((tmp_path / "times.json").read_text())["[70, 32] fp32"]["times"] == {}


def test_a_goal_is_a_ratio_held_from_its_side_or_a_difference_in_microseconds() -> None:
    medians = {"a": 3e-6, "b": 2e-6}
    assert cpu_ensemble.Goal("", "a", "b", 1.5).row(medians) == "|  | 1.50x | at most 1.5x | yes |"
    assert cpu_ensemble.Goal("", "a", "b", 1.4).row(medians).endswith("| NO |")
    assert cpu_ensemble.Goal("", "a", "b", 1.6, "at least").row(medians).endswith("| NO |")
    assert cpu_ensemble.Goal("", "a", "b", 1.5, "above").row(medians) == "|  | 1.00 us | at most 1.5 us | yes |"
