"""Where a response ends: at a special token, or where its text holds the plain text that closes turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.rlhf.job.log import say_once
from prudent.rlhf.sampling.config import RolloutConfig
from prudent.rlhf.sampling.sampler import EndedByText, open_sampler
from prudent.rlhf.sampling.turn import Ending, Turn

from ..templates import ALIKE, ALTERS, DIFFERENT, PLAIN, a_tokenizer
from .sampler_cases import a_model


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def letters(tokenizer: Any, text: str) -> list[int]:
    """One token a letter, which the tokeniser itself would join."""
    return [token for letter in text for token in ids(tokenizer, letter)]


@pytest.mark.parametrize("template", {**ALIKE, **DIFFERENT})
def test_a_turn_that_a_special_token_closes_may_hold_any_text(template: str) -> None:
    tokenizer = a_tokenizer({**ALIKE, **DIFFERENT}[template])
    ending, end = Ending(tokenizer), tokenizer.eos_token_id
    assert (ending.text, ending.stop) == ("", {end})
    said = letters(tokenizer, "one\n\ntwo\n")
    assert ending.cut([*said, end], True) == ([*said, end], True)
    assert ending.response_text([], [*said, end], True) == "one\n\ntwo\n"
    assert ending.response_text([], said, False) == "one\n\ntwo\n"


def test_text_that_the_template_writes_in_front_of_the_special_token_is_no_part_of_a_response() -> None:
    tokenizer = a_tokenizer(ALIKE["chatml"].replace(" <|end|>", "\n<|end|>"))
    ending, end = Ending(tokenizer), tokenizer.eos_token_id
    assert (ending.lead, ending.stop) == ("\n", {end})  # the newline alone ends nothing
    assert ending.response_text([], [*ids(tokenizer, "a\nb\n"), end], True) == "a\nb"
    assert ending.response_text([], ids(tokenizer, "a\nb\n"), False) == "a\nb\n"


@pytest.mark.parametrize("spell", [ids, letters])
def test_two_newlines_end_a_response_and_one_does_not(spell: Any) -> None:
    tokenizer = a_tokenizer(PLAIN["alpaca"][0])
    ending = Ending(tokenizer)
    assert ending.text == "\n\n"
    response = spell(tokenizer, "one\ntwo.\n\nmore\n\n")
    cut, stopped = ending.cut(response, False)
    assert tokenizer.decode(cut) == "one\ntwo.\n\n"
    assert stopped
    assert ending.response_text([], cut, True) == "one\ntwo."
    assert ending.cut(spell(tokenizer, "one\ntwo.\n"), False) == (spell(tokenizer, "one\ntwo.\n"), False)


def test_a_token_that_holds_the_closing_text_ends_a_response_while_it_is_drawn() -> None:
    tokenizer = a_tokenizer(PLAIN["alpaca"][0])
    found = {tokenizer.convert_ids_to_tokens(token) for token in Ending(tokenizer).stop}
    assert found == {"ĊĊ", ".ĊĊ"}


def test_an_ending_before_the_least_number_of_tokens_does_not_count() -> None:
    tokenizer = a_tokenizer(PLAIN["alpaca"][0])
    ending = Ending(tokenizer)
    response = letters(tokenizer, "a\n\nb\n\nc")
    assert tokenizer.decode(ending.cut(response, False)[0]) == "a\n\n"
    assert tokenizer.decode(ending.cut(response, False, least=3)[0]) == "a\n\nb\n\n"
    assert ending.response_text([], ending.cut(response, False, least=3)[0], True) == "a\n\nb"
    assert ending.cut(response, False, least=6) == (response, False)


@pytest.mark.parametrize("kind", PLAIN)
def test_the_run_says_that_plain_text_ends_responses(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    say_once.cache_clear()  # another test may have made it say so
    template, text = PLAIN[kind]
    Turn(a_tokenizer(template), a_model(vocab_size=320))
    assert f"a response ends at its first {text!r}, because the chat template" in capsys.readouterr().err
    Turn(a_tokenizer(ALIKE["chatml"]), a_model(vocab_size=320))
    assert capsys.readouterr().err == ""


def test_a_template_that_alters_responses_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer: expected a chat template that writes a response unchanged"):
        Turn(a_tokenizer(ALTERS), a_model(vocab_size=320))


class _Says:
    """An engine that draws the same responses whatever it is asked."""

    name = "says"

    def __init__(self, *responses: list[int]) -> None:
        self.responses = list(responses)

    def __call__(self, model: Any, prompts: Any, uniform: Any) -> tuple[list[list[int]], list[bool]]:
        return self.responses, [False] * len(self.responses)


def test_an_engine_s_responses_are_cut_where_their_text_ends() -> None:
    tokenizer = a_tokenizer(PLAIN["alpaca"][0])
    engine = _Says(letters(tokenizer, "one\n\ntwo"), letters(tokenizer, "one\ntwo"))
    sampler = EndedByText(engine, Ending(tokenizer), 0)
    expected = [letters(tokenizer, "one\n\n"), letters(tokenizer, "one\ntwo")], [True, False]
    assert (sampler(None, [], torch.empty(0)), sampler.name) == (expected, "says")
    turn = Turn(tokenizer, a_model(vocab_size=320))
    assert isinstance(
        open_sampler(RolloutConfig(), a_model(vocab_size=320), turn.stop, "cpu", turn.ending), EndedByText
    )
