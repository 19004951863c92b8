"""What every server does between a dialect and a scorer: JSON, the aggregation, items, results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel, Scorer
from prudent.rlhf.doors.answering import json_of, read_items, results_of, spec_of
from prudent.rlhf.doors.wire import DialectError


@pytest.fixture(scope="module")
def scorer(tiny_chat_folder: Path) -> Scorer:
    torch.manual_seed(1)
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3, aggregation="tradeoff:0.4,centre=batch")
    return Scorer(model, AutoTokenizer.from_pretrained(tiny_chat_folder), max_length=16, progress=False)


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000])
def test_what_is_no_json_is_a_400(raw: bytes) -> None:
    with pytest.raises(DialectError, match=r"body: expected JSON, got [0-9]+ bytes") as error:
        json_of(raw)
    assert error.value.status == 400


def test_json_is_read() -> None:
    assert json_of('{"a": ["é", 1.5, null]}'.encode()) == {"a": ["é", 1.5, None]}


def test_a_request_gets_the_models_own_aggregation_or_another_but_never_one_of_its_batch(scorer: Scorer) -> None:
    assert str(spec_of(scorer, None)) == "tradeoff:0.4"
    assert str(spec_of(scorer, "min")) == "min"
    for text in ("mean,centre=batch", "tradeoff:0.4,worst=batch", "head:3", "none-such", "mean,trust=1"):
        with pytest.raises(DialectError, match=r"^aggregation: expected") as error:
            spec_of(scorer, text)
        assert error.value.status == 422


def test_an_item_that_cannot_be_read_is_named_by_its_place(scorer: Scorer) -> None:
    with pytest.raises(DialectError, match=r"^item 1: expected some text, got an empty string"):
        read_items(scorer, ["my day", ""])


def test_results_say_what_was_truncated_and_how_many_tokens_were_read(scorer: Scorer) -> None:
    items = ["my day", "my day " * 20]
    read = read_items(scorer, items)
    spec = spec_of(scorer, "min")
    results = results_of(scorer, read, scorer.heads(items), spec)
    assert [result["truncated"] for result in results] == [False, True]
    assert [result["tokens"] for result in results] == [3, 16]
    assert [result["reward"] for result in results] == pytest.approx(scorer.score(items, aggregation="min").reward)
