"""The comparison of features: all three from one reading, on the same held-out pairs, and verdicts that intervals
carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.bench import features
from prudent.bench.nominal_head import Study
from prudent.engine.taps import columns_of, parse_taps, wide_taps
from prudent.rlhf.data.pairs import PreferencePair
from prudent.rlhf.reward.run import AUTO_TAPS


def made_study(last: float, mean: float) -> Study:
    """200 pairs of 40 prompts, 3 + 3 features and 2 of noise, in which the last state and the mean tell which answer is
    better with these strengths, each under noise."""
    g = torch.Generator().manual_seed(0)
    pairs, rows = [], {}
    for i in range(200):
        pair = PreferencePair(f"prompt {i % 40}", f"good {i}", f"the longer bad answer {i}")
        pairs.append(pair)
        for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
            signal = torch.tensor([last, 0, 0, mean, 0, 0, 0, 0]) * sign
            rows[pair.prompt_key, json.dumps(getattr(pair, side))] = signal + torch.randn(8, generator=g)
    return Study(pairs, rows, 1, 0.25)


def test_features_are_those_of_the_last_token_then_the_mean_then_the_log_probability() -> None:
    taps = parse_taps(AUTO_TAPS, 30)
    assert (*wide_taps(30), taps[-1]) == taps  # what the columns below rely on
    assert columns_of(taps, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    whole = torch.arange(10.0).view(1, 10)
    found: dict[str, Tensor] = {name: features.part(name, whole) for name in features.PARTS}
    assert found["last"].tolist() == [[0, 1, 2, 3]]
    assert found["mean"].tolist() == [[4, 5, 6, 7]]
    assert found["wide"].tolist() == [[*range(8)]]
    assert found["auto"].tolist() == [[*range(10)]]


@pytest.mark.parametrize(("last", "mean"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_part_that_knows_more_is_better_on_held_out_pairs(last: float, mean: float) -> None:
    runs = [features.measure(made_study(last, mean), 100, seed) for seed in range(3)]
    row = features.summarise([run for run in runs if run is not None])
    gap = row["correct"]["minus_base"]["mean"]
    assert gap["value"] == pytest.approx(row["correct"]["mean"] - row["correct"]["last"])
    assert (gap["low"] > 0) if mean > last else (gap["high"] < 0)
    assert row["correct"]["wide"] > 0.8  # it has both
    assert row["longer"] == 0.0
    assert set(row["l2"]) == set(row["fit_seconds"]) == {"last", "wide", "mean", "auto"}


def test_a_size_of_which_there_are_too_few_pairs_is_not_measured() -> None:
    assert features.measure(made_study(1.0, 1.0), 190, seed=0) is None


def test_the_verdict_counts_settings_by_their_values_and_their_intervals() -> None:
    def row(loss: tuple[float, float], correct: tuple[float, float]) -> dict[str, Any]:
        gaps = [{"value": sum(g) / 2, "low": g[0], "high": g[1]} for g in (loss, correct)]
        return {key: {"minus_base": {"wide": gap}} for key, gap in zip(("loss", "correct"), gaps, strict=True)}

    better, unclear, worse = (
        row((-0.2, -0.1), (0.1, 0.2)),
        row((-0.2, 0.1), (-0.1, 0.2)),
        row((0.1, 0.2), (-0.2, -0.1)),
    )
    said = features.verdict([better, unclear], "wide")
    assert "a lower log-loss in 2 of 2 settings (1 beyond the 95 % interval)" in said
    assert "a higher accuracy in 2 of 2 settings (1 beyond the 95 % interval)" in said
    assert said.endswith("worse beyond the interval nowhere.")
    assert features.verdict([better, worse], "wide").endswith("worse beyond the interval 2 times.")


def test_a_call_writes_the_page_and_a_later_call_adds_to_it(
    tiny_chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"the {thing} was {how}", "chosen": f"very {good} day", "rejected": bad}
        for thing in ("food", "hotel", "train", "film", "soup", "room")
        for how in ("blue", "long")
        for good, bad in (("good", "bad"), ("great", "awful"), ("happy", "sad"))
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["--model", str(tiny_chat_folder), "--data", str(file), "--cache", str(tmp_path / "cache")]
    given += ["--output", str(tmp_path / "out"), "--seeds", "2", "--max-length", "64", "--dtype", "float32"]
    features.main([*given, "--pairs", "12", "4000"])
    features.main([*given, "--pairs", "20"])
    found = json.loads((tmp_path / "out" / "features.json").read_text())
    assert [row["pairs"] for row in found["results"]] == [12, 20]
    (forward,) = found["forward"].values()
    assert len(forward["seconds"]["last"]) == len(forward["seconds"]["wide"]) == features.ROUNDS
    page = (tmp_path / "out" / "features.md").read_text()
    assert page.splitlines()[2] == features.verdict(found["results"], "wide")
    assert "--data pairs.jsonl --pairs 12 4000 --seeds 2 --max-length 64" in page
    assert str(tmp_path) not in page
    with pytest.raises(SystemExit):
        features.main(["--output", str(tmp_path)])
    assert "--model, --data and --cache are needed" in capsys.readouterr().err
