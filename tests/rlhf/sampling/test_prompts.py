"""Prompts from files in common formats, each once, none too long; an order that needs no state."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prudent.rlhf.sampling.config import RolloutConfig
from prudent.rlhf.sampling.prompts import load_prompts, longest_prompt, prompt_order
from prudent.rlhf.sampling.turn import Turn


@pytest.fixture(scope="module")
def model(tiny_chat_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_chat_folder)


@pytest.fixture(scope="module")
def turn(tiny_chat_folder: Path, model: Any) -> Turn:
    return Turn(AutoTokenizer.from_pretrained(tiny_chat_folder), model)


@pytest.fixture(scope="module")
def plain(tiny_chat_folder: Path, model: Any) -> Turn:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    tokenizer.chat_template = None
    return Turn(tokenizer, model)


def _file(tmp_path: Path, name: str, *rows: Any) -> Path:
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_a_text_file_has_a_prompt_a_line_each_once(tmp_path: Path, turn: Turn) -> None:
    prompts = load_prompts(_file(tmp_path, "p.txt", "my day", "", "the food was", "my day"), turn).prompts
    assert [prompt.item for prompt in prompts] == ["my day", "the food was"]
    assert [prompt.ids for prompt in prompts] == [turn.prompt("my day"), turn.prompt("the food was")]


def test_rows_state_a_text_messages_or_a_pair(tmp_path: Path, turn: Turn) -> None:
    chat = [{"role": "user", "content": "my day"}]
    pair = {"chosen": "the film was good", "rejected": "the film was bad"}
    prompts = load_prompts(_file(tmp_path, "p.jsonl", {"prompt": "the food was"}, {"prompt": chat}, pair), turn).prompts
    assert [prompt.item for prompt in prompts] == ["the food was", chat, "the film was"]
    assert prompts[1].ids == turn.prompt("my day")  # the template writes both alike


@pytest.mark.parametrize(("name", "row"), [("p.txt", "my day"), ("p.jsonl", {"prompt": "my day"})])
def test_the_mark_that_windows_tools_begin_a_file_with_is_no_part_of_the_first_prompt(
    tmp_path: Path, turn: Turn, name: str, row: Any
) -> None:
    path = _file(tmp_path, name, row)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [prompt.item for prompt in load_prompts(path, turn).prompts] == ["my day"]


def test_parquet_is_read(tmp_path: Path, turn: Turn) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"prompt": ["my day", "the hotel"], "other": [1, 2]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert [p.item for p in load_prompts(tmp_path / "p.parquet", turn).prompts] == ["my day", "the hotel"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("p.jsonl", {"text": "a"}, "p.jsonl, line 2: expected the field prompt, got text"),
        ("p.jsonl", {"prompt": None}, "p.jsonl, line 2: prompt: expected a text or a list of messages, got null"),
        ("p.jsonl", "[1]", "p.jsonl, line 2: expected JSON lines, one object per line, got an array"),
        ("p.jsonl", {"prompt": " "}, "line 2: expected a prompt with some text, got an empty one"),
        ("p.jsonl", "{", "line 2: expected one JSON object per line"),
        (
            "p.txt",
            "food " * 30,
            r"line 2: expected at most 20 tokens, so that a response fits after them, got 33: 'food f",
        ),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(tmp_path: Path, turn: Turn, name: str, row: Any, message: str) -> None:
    first: Any = "my day" if name.endswith("txt") else {"prompt": "my day"}
    with pytest.raises(ValueError, match=message):
        load_prompts(_file(tmp_path, name, first, row), turn, 20)


def test_a_prompt_is_joined_from_the_columns_of_its_row(tmp_path: Path, turn: Turn, plain: Turn) -> None:
    rows = [
        {"instruction": "the food", "input": "was cold"},
        {"instruction": "the food", "input": "was warm"},
        {"system": "short", "question": "the food was"},
    ]
    prompts = load_prompts(_file(tmp_path, "p.jsonl", *rows), turn).prompts
    system = {"system": "short", "text": "the food was"}
    assert [prompt.item for prompt in prompts] == ["the food\n\nwas cold", "the food\n\nwas warm", system]
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": "the food was"}]
    assert prompts[2].ids == turn.prompt(chat)
    assert plain.prompt(system) == plain.prompt("short\n\nthe food was")


def test_rows_that_cannot_be_used_are_left_out_and_counted_on_request(
    tmp_path: Path, turn: Turn, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "my day"},
        {"prompt": " "},
        {"prompt": "\ud83d"},
        "{",
        {"prompt": "food " * 30},
        {"prompt": "food"},
    ]
    file = _file(tmp_path, "p.jsonl", *rows)
    assert [prompt.item for prompt in load_prompts(file, turn, 20, skip_bad_rows=True).prompts] == ["my day", "food"]
    assert capsys.readouterr().err == f"prompts: {file}: 4 bad rows skipped\n"


def test_a_column_that_looks_like_content_is_named_but_no_response(
    tmp_path: Path, turn: Turn, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "my day", "chosen": "was very long", "rejected": "was very short", "rubric": "must be very kind"}
    file = _file(tmp_path, "p.jsonl", row)
    load_prompts(file, turn)
    assert capsys.readouterr().err == f"prompts: {file}: not read, although it looks like content: rubric\n"


def test_messages_need_a_chat_template(tmp_path: Path, plain: Turn) -> None:
    row = {"prompt": [{"role": "user", "content": "my day"}]}
    with pytest.raises(ValueError, match=r"line 1: expected plain text, because the tokeniser has no chat template"):
        load_prompts(_file(tmp_path, "p.jsonl", row), plain)


def test_a_source_without_prompts_is_refused(tmp_path: Path, turn: Turn) -> None:
    with pytest.raises(ValueError, match="expected at least one prompt, got none"):
        load_prompts(_file(tmp_path, "p.txt", "", ""), turn)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no.txt", "no.txt: no such file"),
        ("no.jsonl", "no.jsonl: no such file"),
        ("no/such", "no/such: no such file or folder"),
        ("rew.py", "rew.py: expected a file that ends in .txt, .jsonl, .json, .parquet, got .py"),
        ("", "expected a file, a folder or a hub name, got an empty string"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_after_its_key(
    tmp_path: Path, turn: Turn, name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no").mkdir()
    (tmp_path / "rew.py").touch()
    with pytest.raises(ValueError, match=re.escape(f"prompts: {says}")):
        load_prompts(name, turn)


def test_a_prompt_leaves_room_for_response_and_closing(model: Any, turn: Turn) -> None:
    assert longest_prompt(RolloutConfig(max_new_tokens=100), model.config, turn) == 27  # of 128, the closing is one
    assert longest_prompt(RolloutConfig(max_new_tokens=100, max_prompt_tokens=9), model.config, turn) == 9
    assert longest_prompt(RolloutConfig(max_new_tokens=126), model.config, turn) == 1
    with pytest.raises(
        ValueError, match=r"rollout.max_new_tokens: expected at most 126, .* 128 positions too, got 127"
    ):
        longest_prompt(RolloutConfig(max_new_tokens=127), model.config, turn)


def test_a_step_has_different_prompts_and_an_epoch_has_all_but_the_remainder() -> None:
    steps = [prompt_order(10, step, 3, seed=1) for step in range(6)]
    assert all(len(set(numbers)) == 3 for numbers in steps)
    for epoch in (steps[:3], steps[3:]):
        assert max(Counter(number for numbers in epoch for number in numbers).values()) == 1
    assert {n for numbers in steps[:3] for n in numbers} != {n for numbers in steps[3:] for n in numbers}
    assert sorted(prompt_order(4, 7, 4, seed=1)) == [0, 1, 2, 3]


def test_the_order_follows_from_seed_and_step() -> None:
    assert prompt_order(100, 7, 10, seed=3) == prompt_order(100, 7, 10, seed=3)
    assert prompt_order(100, 7, 10, seed=3) != prompt_order(100, 7, 10, seed=4)
    assert prompt_order(100, 7, 10, seed=3) != prompt_order(100, 17, 10, seed=3)


def test_fewer_prompts_than_a_step_takes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout.prompts_per_step: expected at most 3, .* got 4"):
        prompt_order(3, 0, 4, seed=0)
