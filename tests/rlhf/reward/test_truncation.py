"""Texts that are longer than the model reads: train says how many lost their beginning, and what that left alike."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from prudent.rlhf.job.config import load_config
from prudent.rlhf.reward.train import TrainConfig, run_train

LENGTH = 12
_TAIL = " and the train was late and the soup was bad"


def _config(model: Path, rows: list[dict[str, str]], folder: Path, mode: str, *sets: str) -> TrainConfig:
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = (
        ["bt.solver=adamw", "bt.epochs=1", "brme.epochs=1"]
        if mode == "head"
        else ["trunk.max_steps=2", "trunk.batch_size=2"]
    )
    sets = (f"mode={mode}", f"max_length={LENGTH}", "brme.num_heads=2", "eval_fraction=0.25", *sizes, *sets)
    return load_config(TrainConfig, None, list(sets), model=str(model), data=str(data), output=folder / "run")


def _rows(cut: int, alike: int) -> list[dict[str, str]]:
    """12 pairs of 12 prompts: of `cut` the chosen text is too long, of `alike` both are, and end in the same words."""
    things = ["day", "food", "hotel", "train", "film", "soup", "room", "people", "service", "love", "pain", "blue"]
    rows = [{"prompt": f"my {thing}", "chosen": "was good", "rejected": "was bad"} for thing in things]
    for row in rows[:cut]:
        row["chosen"] += " very" * LENGTH
    for row in rows[cut : cut + alike]:
        row["chosen"] += _TAIL * 2
        row["rejected"] += _TAIL * 2
    return rows


@pytest.mark.parametrize("mode", ["head", "full", "lora"])
def test_train_says_how_many_texts_lost_their_beginning(
    tiny_chat_folder: Path, tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    config = _config(tiny_chat_folder, _rows(3, 1), tmp_path, mode)
    with caplog.at_level(logging.WARNING):
        result = run_train(config, progress=False)
    want = {"texts": 5, "of": 24, "max_length": LENGTH, "same_pairs": 1}
    for file in ("data.json", "train.json"):
        assert json.loads((config.output / file).read_text())["truncated"] == want, file
    sentence = "5 of 24 texts were too long and read without the beginning"
    assert caplog.text.count(f"data: {sentence}") == 1
    assert f"{sentence} (max_length {LENGTH})" in str(result)
    assert "pairs whose two texts are equal after the cut: 1" in str(result)


@pytest.mark.parametrize("mode", ["head", "full"])
def test_a_resumed_run_still_says_it(tiny_chat_folder: Path, tmp_path: Path, mode: str) -> None:
    config = _config(tiny_chat_folder, _rows(2, 0), tmp_path, mode)
    before = run_train(config, progress=False).metrics["truncated"]
    (config.output / "train.json").unlink()  # as one killed before its last file was written
    assert run_train(config, resume=True, progress=False).metrics["truncated"] == before
    assert before["texts"] == 2


@pytest.mark.parametrize("mode", ["head", "full"])
def test_pairs_that_are_all_alike_after_the_cut_are_refused_by_max_length(
    tiny_chat_folder: Path, tmp_path: Path, mode: str
) -> None:
    with pytest.raises(ValueError, match=r"^max_length: expected pairs whose two texts differ in the last 12 tokens"):
        run_train(_config(tiny_chat_folder, _rows(0, 12), tmp_path, mode), progress=False)


def test_nothing_is_said_where_no_text_was_cut(tiny_chat_folder: Path, tmp_path: Path) -> None:
    result = run_train(_config(tiny_chat_folder, _rows(0, 0), tmp_path, "head"), progress=False)
    assert result.metrics["truncated"] == {"texts": 0, "of": 24, "max_length": LENGTH, "same_pairs": 0}
    assert "too long" not in str(result)
