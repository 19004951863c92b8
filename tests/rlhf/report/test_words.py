"""Numbers, intervals, tables and messages as text."""

from __future__ import annotations

import pytest

from prudent.rlhf.report import words


def test_a_count_has_a_plural() -> None:
    assert [words.count(number, "sample") for number in (0, 1, 2)] == ["0 samples", "1 sample", "2 samples"]


def test_messages_become_their_contents_and_tool_calls_are_shown() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "No."},
    ]
    shown = 'Rain?\n{"function": {"name": "weather", "arguments": {"city": "Köln"}}}\nNo.'
    assert words.plain_text(messages) == shown
    assert words.plain_text("as it is\n") == "as it is\n"


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["", "accuracy", "n"], ["mean", "71.9", "16"], ["worst case", "7.0", ""]]
    assert words.aligned(rows).split("\n") == [
        "            accuracy   n",
        "mean            71.9  16",
        "worst case       7.0",
    ]


def test_the_first_columns_alone_are_aligned_to_the_left_unless_others_are_named() -> None:
    assert words.aligned([["a", "b"], ["aa", "bb"]], left=(0, 1)).split("\n") == ["a   b", "aa  bb"]


def test_a_markdown_table_has_a_rule_below_its_head() -> None:
    assert words.markdown_table([["a", "b"], ["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_an_interval_that_the_data_did_not_give_is_left_out() -> None:
    assert words.interval((0.5, 0.25, 0.75)) == "[0.25, 0.75]"
    assert words.signed((0.5, -0.25, 0.75), 1) == "+0.5 [-0.2, +0.8]"
    assert words.interval((0.5, None, None)) == ""
    assert words.signed((0.5, None, None)) == "+0.50"
    assert words.signed((None, None, None)) == ""


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.2, "higher"),
        (-0.2, -0.1, "lower"),
        (-0.1, 0.2, "no difference shown"),
        (0.0, 0.2, "no difference shown"),
        (None, None, "no difference shown"),
    ],
)
def test_a_difference_is_claimed_only_if_its_interval_excludes_0(
    low: float | None, high: float | None, said: str
) -> None:
    assert words.verdict((0.1, low, high)) == said


def test_a_verdict_has_its_own_words_and_reference() -> None:
    assert words.verdict((0.6, 0.55, 0.65), "knows", "misleads", "guesses", reference=0.5) == "knows"
    assert words.verdict((0.4, 0.35, 0.45), "knows", "misleads", "guesses", reference=0.5) == "misleads"
    assert words.verdict((0.5, 0.45, 0.55), "knows", "misleads", "guesses", reference=0.5) == "guesses"


def test_an_accuracy_is_given_in_per_cent_with_its_interval() -> None:
    assert words.accuracy_cells({"value": 0.7193, "low": 0.65, "high": 0.8}) == ["71.9", "65.0 to 80.0"]
    difference = {"value": 0.02, "low": -0.01, "high": 0.05}
    assert words.accuracy_cells(difference, sign=True) == ["+2.0", "-1.0 to +5.0"]
    assert words.accuracy_cells({"value": 0.5, "low": None, "high": None}) == ["50.0", "-"]
    assert words.accuracy_cells({"value": None, "low": None, "high": None}) == ["-", "-"]


def test_few_prompts_are_warned_of() -> None:
    assert words.few_prompts(20) == ""
    assert words.few_prompts(1) == "The intervals resample 1 prompt; with fewer than 20 they are too narrow."


def test_texts_that_lost_their_beginning_are_counted() -> None:
    assert words.truncated_texts(0, 10) == ""
    assert words.truncated_texts(1, 10) == "1 of 10 texts was too long and read without the beginning"
    assert words.truncated_texts(3, 10) == "3 of 10 texts were too long and read without the beginning"
