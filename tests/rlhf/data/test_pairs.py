"""Preference data in the formats people have; every broken row named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prudent.engine.text import ItemError
from prudent.rlhf.data.pairs import PairData, PreferencePair, load_pairs, readable_pairs, split_by_prompt


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _load(tmp_path: Path, *rows: Any, **options: Any) -> PairData:
    return load_pairs(_write(tmp_path / "data.jsonl", list(rows)), **options)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_prompt_chosen_rejected(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "good ü", "rejected": "bad", "source": "s", "margin": 2, "other": [1]}
    data = _load(tmp_path, row)
    assert data.pairs == [PreferencePair("p", "good ü", "bad", margin=2.0, source="s")]
    assert data.counts == {
        "rows": 1,
        "pairs": 1,
        "prompts": 1,
        "bad_rows": 0,
        "duplicates": 0,
        "equal": 0,
        "below_gap": 0,
        "unread_columns": [],
    }


def test_a_pair_knows_its_line_which_is_no_part_of_it(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    first, second = _load(tmp_path, row, {**row, "chosen": "c"}).pairs
    assert (first.where, second.where) == tuple(f"{tmp_path / 'data.jsonl'}, line {i}" for i in (1, 2))
    assert first == PreferencePair("p", "a", "b")
    assert "line" not in repr(first)


def test_strength_is_a_margin(tmp_path: Path) -> None:
    assert _load(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b", "strength": 3}).pairs[0].margin == 3.0


_HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: tell me\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (_HH + " The sky is blue.", _HH + " The sky is red.", _HH),
        (_HH + " Yes.", _HH + " Yes. And no.", _HH),
        ("Q: two and two? A: four", "Q: two and two? A: five", "Q: two and two? A:"),
        ("Q: how\nfour", "Q: how\nfourteen", "Q: how"),
    ],
)
def test_the_shared_prefix_of_texts_is_the_prompt(tmp_path: Path, chosen: str, rejected: str, prompt: str) -> None:
    pair = _load(tmp_path, {"chosen": chosen, "rejected": rejected}).pairs[0]
    assert pair.prompt == prompt
    assert (pair.prompt + str(pair.chosen), pair.prompt + str(pair.rejected)) == (chosen, rejected)


def test_the_shared_messages_are_the_prompt(tmp_path: Path) -> None:
    opening = [_user("hi"), _assistant("hello"), _user("tell")]
    row = {"chosen": [*opening, _assistant("blue")], "rejected": [*opening, _assistant("red"), _user("what?")]}
    pair = _load(tmp_path, row).pairs[0]
    assert (pair.prompt, pair.chosen) == (opening, [_assistant("blue")])
    assert pair.rejected == [_assistant("red"), _user("what?")]
    assert pair.items()[0] == {"prompt": opening, "response": [_assistant("blue")]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": [_user("q"), _assistant("a")], "rejected": [_user("q"), _assistant("b")]},
        {"prompt": "q", "chosen": [_assistant("a")], "rejected": [_assistant("b")]},
        {"prompt": [_user("q")], "chosen": [_assistant("a")], "rejected": [_assistant("b")]},
        {"prompt": [_user("q")], "chosen": [_user("q"), _assistant("a")], "rejected": [_user("q"), _assistant("b")]},
        {"prompt": [_user("q")], "chosen": "a", "rejected": "b"},
        {
            "prompt": "q",
            "chosen": [{"content": "a", "role": "assistant", "tool_calls": None}],
            "rejected": [_assistant("b")],
        },
    ],
)
def test_conversations_come_out_alike_however_the_prompt_was_given(tmp_path: Path, row: dict[str, Any]) -> None:
    assert _load(tmp_path, row).pairs == [PreferencePair([_user("q")], [_assistant("a")], [_assistant("b")])]


@pytest.mark.parametrize(
    "row",
    [
        {
            "instruction": "q",
            "completions": [
                {"response": "a", "fine-grained_score": 5.0, "overall_score": 1},
                {"response": "b", "fine-grained_score": 3.0, "overall_score": 9},
                {"response": "c", "fine-grained_score": 2.0, "overall_score": 9},
            ],
        },
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [5, 3, 2]},
        {"prompt": "q", "responses": [{"text": "a", "score": 5}, {"text": "b", "score": 3}, {"text": "c", "score": 2}]},
    ],
)
def test_scored_responses_make_every_pair_with_the_gap(tmp_path: Path, row: dict[str, Any]) -> None:
    data = _load(tmp_path, row)
    found = [(p.chosen, p.rejected, p.chosen_score, p.rejected_score) for p in data.pairs]
    assert found == [("a", "b", 5.0, 3.0), ("a", "c", 5.0, 2.0)]
    assert data.counts["below_gap"] == 1
    assert len(_load(tmp_path, row, min_score_gap=0.5).pairs) == 3


def test_given_scores_filter_pairs_at_the_gap_inclusive(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{s}", "chosen": "a", "rejected": "b", "score_chosen": s, "score_rejected": 5} for s in (6, 7)]
    rows.append({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 5})
    data = _load(tmp_path, *rows)
    assert [p.prompt for p in data.pairs] == ["p7"]
    assert data.counts["below_gap"] == 2


def test_duplicates_and_equal_pairs_are_counted_and_dropped(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    equal_chat = [_user("q"), _assistant("same")]
    data = _load(
        tmp_path,
        row,
        {**row, "source": "again"},
        {**row, "rejected": "a"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"chosen": "whole same", "rejected": "whole same"},
        {"chosen": equal_chat, "rejected": equal_chat},
    )
    assert [(p.chosen, p.rejected) for p in data.pairs] == [("a", "b"), ("b", "a")]
    assert (data.counts["duplicates"], data.counts["equal"], data.counts["rows"]) == (1, 3, 6)


def _call(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {}}}


@pytest.mark.parametrize("content", ["", None])
def test_responses_that_differ_in_their_tool_calls_or_reasoning_are_no_equal_responses(
    tmp_path: Path, content: str | None
) -> None:
    sides = [{"role": "assistant", "content": content, "tool_calls": [_call(name)]} for name in ("look", "delete")]
    thought = [{**_assistant("a"), "thinking": text} for text in ("well", "badly")]
    scored = [{**_assistant("a"), "tool_calls": [_call("look")], "score": 5}, {"response": "b", "score": 1}]
    data = _load(
        tmp_path,
        {"prompt": [_user("q")], "chosen": sides[:1], "rejected": sides[1:]},
        {"prompt": [_user("q")], "chosen": thought[:1], "rejected": thought[1:]},
        {"prompt": [_user("q")], "responses": scored},
    )
    assert (data.counts["equal"], data.counts["bad_rows"], len(data.pairs)) == (0, 0, 3)
    kept = {key: value for key, value in sides[0].items() if value is not None}
    assert [pair.chosen for pair in data.pairs] == [
        [kept],
        thought[:1],
        [{**_assistant("a"), "tool_calls": [_call("look")]}],
    ]


def test_what_only_tells_messages_apart_is_no_part_of_a_conversation(tmp_path: Path) -> None:
    chats = [[{**_user("q"), "id": side}, {**_assistant("a"), "id": side}] for side in ("1", "2")]
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert _load(tmp_path, row, {"chosen": chats[0], "rejected": chats[1]}).counts["equal"] == 1


def test_tools_and_the_system_prompt_go_into_the_prompt_of_each_format(tmp_path: Path) -> None:
    tools, system = [{"type": "function", "function": {"name": "look"}}], {"role": "system", "content": "s"}
    prompts = [
        _load(tmp_path, {**row, "system": "s", "tools": tools}).pairs[0].prompt
        for row in (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"chosen": [_user("q"), _assistant("a")], "rejected": [_user("q"), _assistant("b")]},
            {"prompt": "q", "responses": ["a", "b"], "scores": [5, 1]},
            {"chosen": [system, _user("q"), _assistant("a")], "rejected": [system, _user("q"), _assistant("b")]},
        )
    ]
    assert prompts == [{"messages": [system, _user("q")], "tools": tools}] * 4


def test_one_instruction_with_two_inputs_is_two_prompts(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": text, "chosen": "a", "rejected": "b"} for text in ("1 and 1", "2 and 2")]
    data = _load(tmp_path, *rows)
    assert data.counts["prompts"] == 2
    train, held_out = split_by_prompt(data.pairs, 0.5, 0)
    assert {train[0].prompt, held_out[0].prompt} == {"Add.\n\n1 and 1", "Add.\n\n2 and 2"}


def test_a_prompt_that_the_conversations_lack_is_refused(tmp_path: Path) -> None:
    chats = {"chosen": [_user("q"), _assistant("a")], "rejected": [_user("q"), _assistant("b")]}
    with pytest.raises(
        ValueError, match="line 1: prompt: expected a text that the messages contain, got one that would be"
    ):
        _load(tmp_path, {"prompt": "Be brief.", **chats})


def test_a_column_that_looks_like_content_and_is_not_read_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "rationale": "a is kinder than b"}
    chats = {"chosen": [_user("q"), _assistant("a b c")], "rejected": [_user("q"), _assistant("b")]}
    data = _load(tmp_path, row, {**row, "prompt": "q"}, {**chats, "messages": chats["chosen"]})
    assert data.counts["unread_columns"] == ["rationale"]
    said = f"data: {tmp_path / 'data.jsonl'}: not read, although it looks like content: rationale\n"
    assert capsys.readouterr().err == said


def test_the_same_responses_with_another_margin_are_no_duplicates_so_that_no_order_decides(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data = _load(tmp_path, {**row, "margin": 1}, {**row, "margin": 2}, {**row, "margin": 1})
    assert ([pair.margin for pair in data.pairs], data.counts["duplicates"]) == ([1.0, 2.0], 1)


def _refusing(word: str) -> Any:
    def encode(item: Any, name: str) -> None:
        if word in json.dumps(item):
            raise ItemError(f"no {word} here", name)

    return encode


def test_pairs_that_an_encoder_cannot_read_are_refused_by_line_or_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": c, "rejected": "b"} for p, c in (("p", "a"), ("q", "bad"), ("r", "c"), ("s", "d"))]
    data = _load(tmp_path, *rows)
    parts, file = (data.pairs[:3], data.pairs[3:]), tmp_path / "data.jsonl"
    with pytest.raises(ValueError, match=re.escape(f"foreign: {file}, line 2, chosen: no bad here")):
        readable_pairs(parts, [_refusing("bad")], dict(data.counts), key="foreign")
    with pytest.raises(ValueError, match=re.escape(f"data: {file}, line 3, prompt: no r here")):
        readable_pairs(([data.pairs[2]],), [], dict(data.counts), prompt_encoders=[_refusing("r")])
    counts = dict(data.counts)
    kept = readable_pairs(parts, [_refusing("bad")], counts, skip_bad_rows=True)
    assert [[pair.prompt for pair in part] for part in kept] == [["p", "r"], ["s"]]
    assert (counts["pairs"], counts["prompts"], counts["bad_rows"]) == (3, 3, 1)
    with pytest.raises(
        ValueError, match=r"data: expected a pair that the tokeniser can read, got none; the first error: .*line 1"
    ):
        readable_pairs(parts, [_refusing("b")], dict(data.counts), skip_bad_rows=True)


_GOOD = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "expected one JSON object per line, got Expecting property name"),
        ('["a"]', "expected JSON lines, one object per line, got an array"),
        ("null", "expected an object with fields, got null"),
        ('{"text": "x"}', "expected the fields chosen and rejected, or prompt and responses with scores, got text"),
        ('{"prompt": "p", "chosen": "a", "rejected": null}', "expected chosen and rejected, but rejected is null"),
        ('{"prompt": "p", "chosen": null, "rejected": "b"}', "expected chosen and rejected, but chosen is null"),
        ('{"prompt": "p", "chosen": "a', "got Unterminated string starting at: column 27"),
        ("[" + "1" * 5000 + "]", "expected one JSON object per line, got Exceeds the limit"),
        ('{"prompt": "p", "chosen": 3, "rejected": "b"}', "chosen: expected a text or a list of messages, got int"),
        ('{"prompt": "p", "chosen": [{"role": "user"}], "rejected": []}', "chosen: expected messages with a role"),
        ('{"prompt": "p", "chosen": "a", "rejected": [{"role": "u", "content": "x"}]}', "got one of each"),
        ('{"chosen": "alpha", "rejected": "beta"}', "begin with the same prompt, got neither"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}', "margin: expected a finite number"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}', "margin: expected a finite number, got nan"),
        ('{"prompt": "p", "responses": ["a", "b"]}', "expected a score with each response, got none at index 0"),
        ('{"prompt": "p", "responses": ["a", "b"], "scores": [1]}', "scores: expected a list of 2 numbers"),
        ('{"responses": ["a"], "scores": [1]}', "expected a prompt beside the responses"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "source": 1}', "source: expected a string, got int"),
        (
            '{"prompt": "p", "chosen": "a \\ud83d", "rejected": "b"}',
            r"expected text, got half of a surrogate pair, '\ud83d'",
        ),
        ('{"meta": ' + "[" * 101 + "]" * 101 + "}", "expected at most 100 levels of nesting, got more"),
        ('{"meta": ' + "[" * 99999 + "]" * 99999 + "}", "expected at most 100 levels of nesting, got more"),
    ],
)
def test_a_broken_line_is_refused_by_file_and_line_or_skipped_and_counted(
    tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(f"{_GOOD}\n\n{line}\n")
    with pytest.raises(ValueError, match=r"^data: .*d\.jsonl, line 3: ") as caught:
        load_pairs(file)
    assert message in str(caught.value)
    data = load_pairs(file, skip_bad_rows=True)
    assert (len(data.pairs), data.counts["bad_rows"], data.counts["rows"]) == (1, 1, 2)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(_GOOD.encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: expected UTF-8, got invalid start byte at byte 12"):
        load_pairs(tmp_path / "d.jsonl")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ValueError, match="expected preference pairs, got an empty file"):
        load_pairs(tmp_path / "d.jsonl")


def test_a_file_without_a_usable_pair_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got none \(1 rows, 1 equal; min_score_gap 2\)"):
        _load(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "a"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "no such file"),
        ("data.txt", "expected a file that ends in .jsonl, .json, .parquet, got .txt"),
        ("d.jsonl", "expected a file, got a folder"),
        ("nowhere/set", "no such file or folder"),
        ("nowhere/set:test", "no such file or folder"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_after_its_key(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_pairs(tmp_path / name, key="foreign")
    assert str(raised.value).startswith(f"foreign: {tmp_path / name.partition(':')[0]}: ")


def test_an_array_is_said_to_be_one(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for text in (json.dumps([pair]), json.dumps([pair], indent=1)):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(ValueError, match=r"data: .*d\.json, line 1: expected JSON lines, .* got an array: write"):
            load_pairs(tmp_path / "d.json")


def test_the_mark_that_windows_tools_begin_a_file_with_is_passed_over(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(pair).encode())
    assert load_pairs(tmp_path / "d.jsonl").pairs[0].prompt == "p"


def test_a_gap_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_score_gap: expected a number above 0, got 0"):
        load_pairs(tmp_path / "d.jsonl", min_score_gap=0)


def test_limit_counts_rows(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(9)]
    assert len(_load(tmp_path, *rows, limit=4).pairs) == 4


def _pairs(prompts: int, each: int) -> list[PreferencePair]:
    return [PreferencePair(f"p{i}", f"a{j}", "b") for i in range(prompts) for j in range(each)]


@pytest.mark.parametrize(("prompts", "fraction", "held"), [(10, 0.2, 2), (2, 0.01, 1), (2, 0.99, 1), (33, 0.1, 3)])
def test_the_split_keeps_prompts_apart_and_loses_nothing(prompts: int, fraction: float, held: int) -> None:
    pairs = _pairs(prompts, 3)
    train, held_out = split_by_prompt(pairs, fraction, seed=1)
    assert len({p.prompt for p in held_out}) == held
    assert not {str(p.prompt) for p in train} & {str(p.prompt) for p in held_out}
    assert sorted(map(repr, train + held_out)) == sorted(map(repr, pairs))


def test_the_split_goes_by_the_seed_and_not_by_the_order() -> None:
    pairs = _pairs(20, 2)
    held = [
        {p.prompt for p in split_by_prompt(order, 0.3, seed)[1]}
        for order, seed in ((pairs, 0), (pairs[::-1], 0), (pairs, 1))
    ]
    assert held[0] == held[1] != held[2]


def test_a_split_that_cannot_be_is_refused_and_zero_holds_out_nothing() -> None:
    assert split_by_prompt(_pairs(1, 4), 0.0, 0) == (_pairs(1, 4), [])
    with pytest.raises(ValueError, match="expected at least two prompts to split, got one"):
        split_by_prompt(_pairs(1, 4), 0.1, 0)
    with pytest.raises(ValueError, match=r"eval_fraction: expected a number in \[0, 1\), got 1"):
        split_by_prompt(_pairs(3, 1), 1.0, 0)


@pytest.mark.parametrize(
    ("name", "pairs", "prompts"),
    [("hh_harmless_base_test", 2303, 2301), ("openassistant_en100", 732, 207), ("ukpconvarg1_strict", 11424, 32)],
)
def test_real_preference_data_loads_whole(shared_dir: Path, name: str, pairs: int, prompts: int) -> None:
    counts = load_pairs(shared_dir / "data" / f"{name}.jsonl").counts
    assert (counts["pairs"], counts["prompts"], counts["bad_rows"]) == (pairs, prompts, 0)
