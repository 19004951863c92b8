"""The comparison with TRL: the same work on both sides, each in its own process, and a side that fails says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prudent.bench import ppo_sides, ppo_trl
from prudent.bench.ppo_sides import OurLoop, Sides

TINY = Sides(shape=tuple(ppo_trl.SMALL.items()), prompts=4, prompt_tokens=6, response_tokens=5, micro_rows=2, steps=3)


def test_settings_go_through_a_file_unchanged(tmp_path: Path) -> None:
    TINY.write(tmp_path / "settings.json")
    assert Sides.read(tmp_path / "settings.json") == TINY


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_our_side_times_every_step_but_the_first(mode: str) -> None:
    found = ppo_sides.run("ours", replace(TINY, mode=mode))
    assert len(found["seconds"]) == 2
    assert all(seconds > 0 for seconds in found["seconds"])


def test_every_response_has_its_full_length() -> None:
    samples = OurLoop(TINY).draw(0)
    assert [len(response) for response in samples.responses] == [5] * 4
    assert not any(samples.stopped)


def test_our_peak_counts_weights_and_what_the_step_takes() -> None:
    weights = sum(p.nbytes for p in OurLoop(TINY).policy.parameters())
    peak = ppo_sides.run("ours", replace(TINY, memory=True, steps=2))["peak"]
    assert weights < peak < 100 * weights


def test_another_trl_is_refused_with_the_flags_that_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_sides.metadata, "version", lambda name: "1.16.0")
    with pytest.raises(ValueError, match=r"--trl-path: expected TRL 1\.12, the last with PPO, got 1\.16\.0"):
        ppo_sides.trl(TINY)


def _answers(monkeypatch: pytest.MonkeyPatch, trl: dict[str, Any]) -> None:
    def child(side: str, sides: Sides, python: str, path: str, limit: float = 0) -> dict[str, Any]:
        if side == "trl":
            return trl
        return {"peak": 2**20} if sides.memory else {"seconds": [0.5, 1.0, 0.5]}

    monkeypatch.setattr(ppo_trl, "child", child)


def test_the_ratios_are_ours_to_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, {"seconds": [2.0], "peak": 3 * 2**20})
    row = ppo_trl.compare(TINY, ("python", ""), rounds=1, progress=False)
    assert row["ours"]["samples_per_second"] == 8
    assert row["faster"] == 4
    assert row["less_memory"] == 3


def test_a_side_that_fails_says_why_and_gets_no_ratio(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _answers(monkeypatch, {"error": "no module named trl"})
    assert ppo_trl.main(["--out", str(tmp_path), "--mode", "lora", "--quiet"]) == 1
    said = capsys.readouterr().out
    assert "lora, trl: no module named trl" in said
    assert "not measured" in said


def test_a_mode_that_is_not_run_keeps_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _answers(monkeypatch, {"seconds": [2.0], "peak": 2**20})
    for mode in ("full", "lora"):
        assert ppo_trl.main(["--out", str(tmp_path), "--mode", mode, "--quiet"]) == 0
    rows = json.loads((tmp_path / "ppo_trl.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["lora", "full"]
    assert ppo_trl.main(["--out", str(tmp_path), "--mode", "lora", "--steps", "7", "--quiet"]) == 0
    rows = json.loads((tmp_path / "ppo_trl.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["lora"]  # other sizes are another comparison


def test_one_step_leaves_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="steps: expected at least 2"):
        ppo_trl.main(["--steps", "1"])


@pytest.mark.slow
def test_a_child_that_cannot_run_is_a_sentence() -> None:
    found = ppo_trl.child("trl", Sides(model="/no/such/model"), ppo_trl.sys.executable, "")
    assert list(found) == ["error"]
    assert "\n" not in found["error"]
