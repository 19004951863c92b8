"""The study of the nominal head on a trained trunk: what it writes, and that a call goes on where one stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from prudent.bench import trained_trunk
from prudent.bench.nominal_head import SCORERS


def test_the_table_names_every_scorer_and_finished_seeds_are_not_trained_again(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    rows = [
        {"prompt": f"the {thing} was", "chosen": f"very {good} day", "rejected": bad}
        for thing in ("food", "hotel", "train", "film", "soup", "room")
        for good, bad in (("good", "bad"), ("great", "awful"), ("happy", "sad"))
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trained: list[int] = []
    train = trained_trunk.run_train

    def counted(config: Any, **options: Any) -> Any:
        trained.append(config.seed)
        return train(config, **options)

    monkeypatch.setattr(trained_trunk, "run_train", counted)
    given = ["--model", str(tiny_chat_folder), "--mode", "full", "--data", str(data), "--pairs", "16"]
    given += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out"), "--set", "trunk.max_steps=2"]
    for seeds in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["trained_trunk", *given, "--seeds", seeds])
        trained_trunk.main()
    assert trained == [0, 1]
    (result,) = json.loads((tmp_path / "out" / "trained_trunk.json").read_text()).values()
    assert set(result["rows"]) == set(SCORERS)
    assert len(result["held_out_pairs"]) == len(result["rows"]["nominal"]["by_seed"]) == 2
    assert result["rows"]["longer answer"]["accuracy"]["value"] == 1.0
    page = (tmp_path / "out" / "trained_trunk.md").read_text()
    assert "--mode full --data DATA/pairs.jsonl --pairs 16" in page
    assert str(tmp_path) not in page
    assert not list((tmp_path / "work").rglob("*.safetensors"))
