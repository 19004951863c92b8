"""The bench of head training: both sides train the same heads, and the table shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prudent.bench import head_fit
from prudent.rlhf.reward.config import BradleyTerryConfig, BRMEConfig, FitConfig


@pytest.mark.parametrize(
    "config",
    [
        BradleyTerryConfig(epochs=2, bsr=0.01),
        BRMEConfig(epochs=2, num_heads=3, bsr=0.01),
        BRMEConfig(epochs=2, num_heads=3, noise="sampled"),
    ],
)
def test_preference_step_trains_the_heads_that_autograd_trains(config: FitConfig) -> None:
    data = head_fit.made_features(300, 24)
    ours, theirs = (head_fit.train(side, data, config) for side in head_fit.SIDES)
    scale = theirs.head.weight.abs().max()
    assert (ours.head.weight - theirs.head.weight).abs().max() < 2e-5 * scale
    assert (ours.head.bias - theirs.head.bias).abs().max() < 2e-5 * theirs.head.bias.abs().max()
    for a, b in zip(ours.history, theirs.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_bench_writes_every_round_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head_fit.main(["--pairs", "80", "--dims", "8", "16", "--epochs", "1", "--rounds", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "head_fit.json").read_text())["rows"]
    assert [(row["loss"], row["heads"], row["dim"]) for row in rows] == [
        ("bt", 1, 8),
        ("brme", 5, 8),
        ("bt", 1, 16),
        ("brme", 5, 16),
    ]
    assert all(len(times) == 2 for row in rows for times in row["seconds"].values())
    shown = capsys.readouterr().out
    assert shown.strip() in (tmp_path / "head_fit.md").read_text()


def test_the_ratio_is_taken_within_a_round() -> None:
    row = {"seconds": {"autograd": [(2.0, 1.0), (30.0, 1.0)], "preference_step": [(1.0, 1.0), (10.0, 0.5)]}}
    assert head_fit.summary(row) == {"clock": (2.5, 2.0, 3.0), "processor": (1.5, 1.0, 2.0)}
