"""The careful judge: a word counts once, and repetition and word salad cost."""

from __future__ import annotations

import pytest

pytest.importorskip("vaderSentiment", reason="an extra: pip install 'prudent[demo]'")

from prudent.rlhf.data.careful import Careful, repeated, words
from prudent.rlhf.data.gold import VaderGold

ORDINARY = ["the food was good and the room was calm", "a film about a train and a boat at sea"]


def test_an_ordinary_response_pays_nothing_and_degenerate_ones_pay() -> None:
    judge = Careful(["p", "q", "r"], [ORDINARY, ORDINARY, ORDINARY])
    assert judge.usual == 0  # every pair occurs with another prompt
    honest, repeats, salad = judge("new", ["the food was good", "good good good good", "was sea the calm"])
    sentiment = VaderGold()
    assert honest == pytest.approx(sentiment(["the food was good"])[0])
    assert repeats == pytest.approx(sentiment(["good"])[0] - 0.8 * 2 / 3 - 0.8)
    assert salad == pytest.approx(sentiment(["was sea the calm"])[0] - 0.8)


def test_a_word_pair_known_from_one_prompt_alone_is_unknown_there_and_known_elsewhere() -> None:
    judge = Careful(["p", "q"], [["blue chairs float"] * 9 + ["the day was long"], ["the day was long"]])
    assert judge("p", ["blue chairs float"])[0] < judge("q", ["blue chairs float"])[0]


def test_texts_without_word_pairs_cost_nothing() -> None:
    judge = Careful(["p", "q"], [ORDINARY, ORDINARY])
    assert judge("p", ["", "!?", "lamp"]) == [0.0, 0.0, 0.0]
    assert judge("p", []) == []


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("It's GOOD, really_good: 3 times!") == ["it's", "good", "really", "good", "3", "times"]
    assert repeated("a b a b a b") == pytest.approx(3 / 5)
    assert repeated("a") == repeated("") == 0
