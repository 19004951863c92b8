"""The comparison of fits: pairs by prompt, intervals over seeds and prompts, results that add up over calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prudent.bench import fit


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """80 pairs of 20 prompts in which the chosen answer holds the good word."""
    rows = []
    for i in range(80):
        prompt = (
            f"the {('food', 'hotel', 'train', 'film', 'soup')[i % 5]} was {('blue', 'long', 'short', 'loud')[i // 20]}"
        )
        rows.append(
            {"prompt": prompt, "chosen": f"it was good {'nice ' * (i % 3)}day", "rejected": f"bad food {i % 7}"}
        )
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_both_fits_are_measured_on_the_same_held_out_pairs(
    tiny_chat_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    common = ["--model", str(tiny_chat_folder), "--data", f"{pairs_file}:60", "--cache", str(tmp_path / "cache")]
    sizes = ["--seeds", "2", "--max-length", "64", "--dtype", "float32", "--pairs"]
    fit.main([*common, "--output", str(out), *sizes, "30", "4000"])
    (row,) = json.loads((out / "fit.json").read_text())["results"]  # 4000 pairs: more than there are
    assert (row["pairs"], row["seeds"], len(row["l2"])) == (30, 2, 2)
    assert row["loss"]["difference"]["value"] == pytest.approx(row["loss"]["exact"] - row["loss"]["adamw"])
    assert row["correct"]["exact"] > 0.9
    text = (out / "fit.md").read_text()
    assert str(tmp_path) not in text
    assert "| 30 |" in text
    fit.main([*common, "--output", str(out), *sizes, "20"])
    assert [row["pairs"] for row in json.loads((out / "fit.json").read_text())["results"]] == [30, 20]


def test_the_interval_resamples_seeds_and_prompts() -> None:
    seeds, prompts = torch.arange(4).repeat_interleave(50), torch.arange(50).repeat(4)
    by_seed = fit.interval(seeds.double(), seeds, prompts)
    by_prompt = fit.interval(prompts.double(), seeds, prompts)
    assert by_seed.value == 1.5
    assert by_seed.low is not None
    assert by_seed.low <= 0.75  # as wide as four seeds make it, not as 200 pairs would
    assert by_prompt.low == pytest.approx(24.5 - 1.96 * 14.43 / 50**0.5, abs=0.5)


def test_the_verdict_counts_what_the_intervals_carry() -> None:
    def row(loss: tuple[float, float], correct: tuple[float, float]) -> dict[str, Any]:
        gaps = [{"difference": {"value": sum(g) / 2, "low": g[0], "high": g[1]}} for g in (loss, correct)]
        return {"loss": gaps[0], "correct": gaps[1]}

    said = fit._verdict([row((-0.2, -0.1), (0.1, 0.2)), row((-0.1, 0.1), (-0.2, -0.1)), row((0.1, 0.2), (-0.1, 0.1))])
    assert "log-loss is lower beyond the interval in 1 of 3 settings, worse in 1" in said
    assert "accuracy is higher beyond the interval in 1 of 3 settings, worse in 1" in said


def test_the_exact_fit_is_timed() -> None:
    (row,) = fit.seconds([(200, 12)])
    assert row["clock"] > 0
    assert row["values"] >= 13


def test_a_call_without_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit.main(["--output", str(tmp_path)])
    assert "--model, --data and --cache are needed, or --seconds" in capsys.readouterr().err
