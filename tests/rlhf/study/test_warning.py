"""`prudent study warning`: when gold falls, thresholds from other runs, how far ahead a signal crosses one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prudent.rlhf.job.config import load_config
from prudent.rlhf.ppo.config import PPOConfig, RewardConfig
from prudent.rlhf.study.overoptimisation.config import WarningConfig
from prudent.rlhf.study.overoptimisation.warning import fall_of, run_warning, smoothed, threshold
from prudent.rlhf.study.overoptimisation.warning_report import finding

_STEPS = 40


def _write(folder: Path, seed: int, gold: list[float], kl: list[float], distance: list[float]) -> None:
    folder.mkdir(parents=True)
    config = PPOConfig(
        model="m", prompts="p.txt", output=folder, seed=seed, reward=RewardConfig(source="r"), gold="vader"
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    columns = zip(gold, kl, distance, strict=True)
    rows = [{"step": i, "gold/mean": g, "kl/sequence": k, "reward/distance": d} for i, (g, k, d) in enumerate(columns)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _runs(folder: Path) -> Path:
    """In 6 runs gold falls at step 30, 10 after the distance rises; in 20 it stays. KL rises alike in all."""
    kl = [0.1 * i for i in range(_STEPS)]
    falling = [1.0] * 30 + [0.0] * (_STEPS - 30)
    for number in range(26):
        bad = number < 6
        distance = [0.8 + 0.001 * number] * 20 + [1.5 if bad else 0.8 + 0.002 * number] * (_STEPS - 20)
        _write(folder / f"run-{number}", number % 2, falling if bad else [1.0] * _STEPS, kl, distance)
    return folder


def test_gold_has_fallen_where_it_stays_below_its_maximum() -> None:
    gold = torch.tensor([0.0, 1.0, 0.2, 1.0, 0.9, 0.5, 0.7, 0.6])
    assert fall_of(gold, 0.25) == 5
    assert fall_of(gold, 0.45) is None  # it comes back
    assert fall_of(torch.tensor([0.0, 1.0, 0.2]), 0.25) == 2


def test_an_average_takes_the_last_steps_alone() -> None:
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_a_threshold_is_crossed_by_no_more_than_the_share() -> None:
    peaks = torch.arange(20.0)
    assert threshold(peaks, 0.05) == 18  # one of 20 is beyond it
    assert threshold(peaks, 0.1) == 17
    assert threshold(peaks[:10], 0.05) == 9  # a twentieth of ten runs is none


def test_a_signal_that_rises_ten_steps_ahead_is_found_and_one_that_rises_in_every_run_is_not(tmp_path: Path) -> None:
    config = load_config(WarningConfig, None, ["window=1"], runs=_runs(tmp_path / "runs"), output=tmp_path / "out")
    metrics = run_warning(config).metrics
    assert (metrics["runs"], metrics["fallen"]) == (26, 6)
    distance, kl = metrics["signals"]["distance"]["0.05"], metrics["signals"]["KL"]["0.05"]
    assert distance["recall"][0] == 1
    assert distance["recall"][1] > 0.5  # six of six
    assert distance["lead"] == [10, 10, 10]
    assert kl["recall"][0] == 0
    assert kl["lead"][0] is None
    assert "distance (100%, 10 steps ahead)" in finding(metrics)
    assert "| distance | 5% |" in (tmp_path / "out" / "warning.md").read_text()
    assert (tmp_path / "out" / "warning.png").stat().st_size > 5_000


def test_runs_that_cannot_answer_are_refused(tmp_path: Path) -> None:
    flat = [1.0] * _STEPS
    for seed in (0, 1):
        _write(tmp_path / "runs" / str(seed), seed, flat, flat, flat)
    config = WarningConfig(runs=tmp_path / "runs", output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"runs: expected some whose gold falls .* got 0 of 2 falling"):
        run_warning(config)
    with pytest.raises(ValueError, match="runs: expected runs of at least two seeds"):
        run_warning(WarningConfig(runs=tmp_path / "runs" / "0", output=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"expected at least 60 steps with gold, got 40"):
        run_warning(WarningConfig(runs=tmp_path / "runs", output=tmp_path / "third", window=30))
