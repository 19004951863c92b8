"""The prompt from the columns of a row; columns that nothing reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prudent.rlhf.data.columns import RowError, unread_columns
from prudent.rlhf.data.rows import pairs_of_row, prompt_of_row

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why? "}, "Why? "),
        ({"query": "Why?"}, "Why?"),
        ({"input": "Why?"}, "Why?"),
        ({"instruction": "Add.", "input": "1 and 2 "}, "Add.\n\n1 and 2 "),
        ({"input": "1 and 2", "instruction": "Add."}, "Add.\n\n1 and 2"),
        ({"instruction": "Add.", "input": ""}, "Add."),
        ({"instruction": "Add.", "input": None}, "Add."),
        ({"question": "Who?", "context": "Ann came."}, "Ann came.\n\nWho?"),
        ({"question": "Who?", "history": "Ann came."}, "Ann came.\n\nWho?"),
        ({"prompt": "Question: Who?\nAnswer:", "question": "Who?"}, "Question: Who?\nAnswer:"),
        ({"prompt": "Who?", "question": "Who?"}, "Who?"),
        ({"instruction": "Spell a word.", "input": "a"}, "Spell a word.\n\na"),
        ({"system": "Be brief.", "question": "Who?"}, {"system": "Be brief.", "text": "Who?"}),
        ({"system_prompt": "Be brief.", "prompt": "Who?"}, {"system": "Be brief.", "text": "Who?"}),
        ({"system": "", "question": "Who?"}, "Who?"),
        (
            {"system": "Be brief.", "prompt": [_turn("user", "Who?")]},
            [_turn("system", "Be brief."), _turn("user", "Who?")],
        ),
        (
            {"system": "Be brief.", "prompt": [_turn("system", "Be brief."), _turn("user", "Who?")]},
            [_turn("system", "Be brief."), _turn("user", "Who?")],
        ),
        (
            {"history": [["Hi", "Hello"]], "instruction": "Who?"},
            [_turn("user", "Hi"), _turn("assistant", "Hello"), _turn("user", "Who?")],
        ),
        (
            {"history": [_turn("user", "Hi"), _turn("assistant", "Hello")], "system": "S.", "prompt": "Who?"},
            [_turn("system", "S."), _turn("user", "Hi"), _turn("assistant", "Hello"), _turn("user", "Who?")],
        ),
        ({"prompt": "Who?", "tools": [TOOL]}, {"messages": [_turn("user", "Who?")], "tools": [TOOL]}),
        ({"prompt": "Who?", "tools": json.dumps([TOOL])}, {"messages": [_turn("user", "Who?")], "tools": [TOOL]}),
        ({"prompt": "Who?", "tools": []}, "Who?"),
        ({"prompt": [_turn("user", "Hi. Who?")], "question": "Hi. Who?"}, [_turn("user", "Hi. Who?")]),
    ],
)
def test_every_known_column_is_in_the_prompt(row: dict[str, Any], prompt: Any) -> None:
    assert prompt_of_row(row) == prompt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [_turn("user", "Hi")], "question": "Who?"}, "question: expected a text that the messages contain"),
        (
            {"prompt": [_turn("user", "Hi")], "input": [_turn("user", "Hi")]},
            "prompt and input: expected messages in one",
        ),
        ({"prompt": "a", "system": "b", "system_prompt": "c"}, "system and system_prompt: expected one system prompt"),
        ({"prompt": [_turn("system", "a")], "system": "b"}, "expected one system prompt, got a column and a message"),
        ({"prompt": "a", "system": 3}, "system: expected a text, got int"),
        ({"prompt": "a", "context": {"title": "t"}}, "context: expected a text or a list of messages, got dict"),
        ({"prompt": "a", "history": [["b"]]}, r"history: expected messages or \[question, answer\] pairs, got \['b'\]"),
        ({"prompt": "a", "tools": "clock()"}, "tools: expected a list of objects, or one written as JSON"),
        ({"prompt": "a", "tools": [1]}, "tools: expected a list of objects, got"),
    ],
)
def test_columns_that_cannot_be_joined_are_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        prompt_of_row(row)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "p", "rationale": "because it is so"}, ["rationale"]),
        ({"prompt": "p", "notes": ["one two three"], "extra": {"deep": [{"x": "one two three"}]}}, ["notes", "extra"]),
        ({"prompt": "p", "id": "one two three", "prompt_id": "one two three", "category": "open question here"}, []),
        ({"prompt": "p", "score": 3, "label": "good one", "other": [1]}, []),
        ({"prompt": "one two three", "full": "one two three"}, []),
        ({"prompt": [{**_turn("user", "p"), "comment": "one two three", "id": "x"}]}, ["prompt.comment"]),
        (
            {"prompt": "p", "passage": "\u732b\u306f\u30de\u30c3\u30c8\u306e\u4e0a", "lang_name": "\u4e2d\u6587"},
            ["passage"],
        ),
        ({"prompt": "p", "image": "cat.png", "videos": []}, ["image"]),
        (
            {"prompt": "p", "functions": [{"name": "f"}], "chat_template_kwargs": {"think": False}},
            ["functions", "chat_template_kwargs"],
        ),
    ],
)
def test_a_column_that_looks_like_content_is_found(row: dict[str, Any], found: list[str]) -> None:
    assert unread_columns(row, ("prompt",)) == found


def test_what_responses_with_scores_hold_beside_their_text_is_found() -> None:
    response = {"response": "one two three", "score": 5, "model": "m of n o", "system_prompt": "Talk like a pirate."}
    row = {"prompt": "p", "responses": [response], "tools": [{"name": "f", "description": "does this and that"}]}
    assert unread_columns(row, ("prompt", "responses", "tools")) == ["responses.system_prompt"]
    assert unread_columns({**row, "what": "does this and that"}, ("prompt", "tools"), ("responses",)) == []


def test_an_old_function_call_is_refused_because_templates_read_tool_calls() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    row = {"prompt": "p", "chosen": [call], "rejected": [_turn("assistant", "a")]}
    with pytest.raises(RowError, match=r"^chosen: expected tool_calls, which chat templates read, got function_call"):
        pairs_of_row(row, 2.0)
