"""The study of the nominal head: it finds a known difference, follows a rule in its verdict, and reuses features."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from prudent.bench import nominal_head


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """80 pairs of 20 prompts in which the longer answer always wins and holds the good word."""
    rows = []
    for i in range(80):
        prompt = (
            f"the {('food', 'hotel', 'train', 'film', 'soup')[i % 5]} was {('blue', 'long', 'short', 'loud')[i // 20]}"
        )
        rows.append({"prompt": prompt, "chosen": f"it was good {'nice ' * (i % 3)}day", "rejected": "bad food"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["nominal_head", *arguments])
    nominal_head.main()


def test_the_table_names_every_scorer_with_its_interval(
    tiny_chat_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    common = ["--model", str(tiny_chat_folder), "--data", str(pairs_file), "--cache", str(cache), "--output", str(out)]
    run(monkeypatch, *common, "--seeds", "2", "--heads", "3", "--max-length", "64", "--dtype", "float32")
    result = json.loads((out / "nominal_head.json").read_text())["results"][0]
    assert set(result["rows"]) == set(nominal_head.SCORERS)
    assert result["rows"]["longer answer"]["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["rows"]["single"]["minus_single"]["value"] == 0
    assert len(result["held_out_pairs"]) == len(result["rows"]["nominal"]["by_seed"]) == 2
    page = (out / "nominal_head.md").read_text()
    assert "1/3 of the pairs" in page
    assert all(f"| {name} |" in page for name in nominal_head.SCORERS)
    assert str(tmp_path) not in page

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("features were computed twice")

    monkeypatch.setattr(nominal_head.Scorer, "features", refuse)
    run(monkeypatch, *common, "--seeds", "1", "--heads", "2", "--max-length", "64", "--dtype", "float32")


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.01, 0.03, "more accurate than"), (-0.03, -0.01, "LESS accurate"), (-0.01, 0.02, "no difference")],
)
def test_the_verdict_follows_from_the_interval(low: float, high: float, says: str) -> None:
    row = {"minus_single": {"value": (low + high) / 2, "low": low, "high": high}}
    result = {"model": "m", "data": "d", "rows": {"nominal": row}}
    (line,) = nominal_head.verdict([result])
    assert says in line


def test_prompts_that_come_back_in_another_seed_are_one_group() -> None:
    side = torch.tensor([1.0, 0.0])
    sides = {name: (side, torch.tensor([0.0, 1.0])) for name in nominal_head.SCORERS}
    summary = nominal_head.summarise([(["a", "b"], sides), (["a", "b"], sides)])
    assert summary["held_out_prompts"] == 2
    assert summary["rows"]["single"]["accuracy"]["value"] == 0.5
