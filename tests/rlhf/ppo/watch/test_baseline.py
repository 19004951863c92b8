"""Preference data as a baseline: read like the policy's own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prudent.rlhf.ppo.batch import token_batch
from prudent.rlhf.ppo.watch.baseline import PAIRS, preference_texts
from prudent.rlhf.sampling.turn import Turn


@pytest.fixture(scope="module")
def parts(tiny_chat_folder: Path) -> tuple[Turn, Any]:
    """The tiny policy's turn and config."""
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_folder)
    return Turn(AutoTokenizer.from_pretrained(tiny_chat_folder), model), model.config


def _data(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_both_responses_of_a_pair_are_read_up_to_the_token_that_closes_them(
    parts: tuple[Turn, Any], tmp_path: Path
) -> None:
    turn, config = parts
    data = _data(tmp_path / "pairs.jsonl", [{"prompt": "the food", "chosen": "very good", "rejected": "bad"}])
    texts = preference_texts(data, turn, config, 7, 0)
    assert [prompt.item for prompt in texts.prompts] == ["the food"]
    assert texts.samples.prompt_index == [7, 7]  # the run's own seven come first
    assert texts.samples.stopped == [True, True]
    assert all(ids[-1] == turn.closing[0] for ids in texts.samples.responses)
    batch = token_batch(texts.samples, [0], closing=turn.closing, packed=False, device="cpu")
    assert batch.input_ids[0].tolist() == turn.whole("the food", "very good")


def test_a_bounded_draw_that_depends_on_the_seed_alone(parts: tuple[Turn, Any], tmp_path: Path) -> None:
    turn, config = parts
    words = ["food", "hotel", "day", "train", "film", "soup", "room", "people", "service"]
    rows = [{"prompt": f"{a} {b}", "chosen": "good", "rejected": "bad"} for a in words for b in words]
    data = _data(tmp_path / "pairs.jsonl", rows)
    first = preference_texts(data, turn, config, 0, 1)
    assert len(first.samples.responses) == 2 * PAIRS
    assert preference_texts(data, turn, config, 0, 1) == first
    assert preference_texts(data, turn, config, 0, 2) != first


def test_what_does_not_fit_the_policy_is_left_out_and_nothing_left_is_refused(
    parts: tuple[Turn, Any], tmp_path: Path
) -> None:
    turn, config = parts
    long = "good " * 200
    half = _data(tmp_path / "half.jsonl", [{"prompt": "the food", "chosen": long, "rejected": "bad"}])
    assert len(preference_texts(half, turn, config, 0, 0).samples.responses) == 1
    whole = _data(tmp_path / "whole.jsonl", [{"prompt": long, "chosen": "good", "rejected": "bad"}])
    with pytest.raises(ValueError, match="a response that fits the policy's 128 positions"):
        preference_texts(whole, turn, config, 0, 0)
