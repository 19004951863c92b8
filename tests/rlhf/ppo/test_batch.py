"""Samples as token tensors: which state predicts which token, where rewards are read, and how batches are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prudent.rlhf.ppo.batch import Samples, micro_batches, response_mask, sequence_length, token_batch

STOP, CLOSE = 9, [8, 7]
# two samples of one prompt, the first of them ended by itself; and an answer that is its stop token alone
SAMPLES = Samples([[1, 2], [1, 2], [5]], [[3, STOP], [4, 4, 4], [STOP]], [True, False, True], [0, 0, 1])


def test_a_padded_batch_reads_each_response_but_for_its_last_token() -> None:
    batch = token_batch(SAMPLES, [2, 0, 1], packed=False, device="cpu")
    assert batch.input_ids.tolist() == [[5, 0, 0, 0], [1, 2, 3, 0], [1, 2, 4, 4]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert batch.targets.tolist() == [STOP, 3, STOP, 4, 4, 4]
    assert batch.rows.tolist() == [0, 5, 6, 9, 10, 11]  # the prompt's last token predicts the response's first
    assert batch.sequence.tolist() == [0, 1, 1, 2, 2, 2]
    assert batch.offset.tolist() == [0, 0, 1, 0, 1, 2]
    assert batch.last.tolist() == [0, 6, 11]
    assert batch.first.tolist() == [0, 6, 10]  # of a response that is not read, at least the last token


def test_a_packed_batch_is_one_row_whose_positions_restart() -> None:
    batch = token_batch(SAMPLES, [2, 0, 1], packed=True, device="cpu")
    assert batch.input_ids.tolist() == [[5, 1, 2, 3, 1, 2, 4, 4]]
    assert batch.position_ids.tolist() == [[0, 0, 1, 2, 0, 1, 2, 3]]
    assert batch.attention_mask is None
    assert batch.rows.tolist() == [0, 2, 3, 5, 6, 7]
    assert batch.last.tolist() == [0, 3, 7]
    assert batch.first.tolist() == [0, 3, 6]
    assert batch.response().int().tolist() == [[1, *[0] * 7], [0, 0, 0, 1, 0, 0, 0, 0], [*[0] * 6, 1, 1]]


def test_closing_replaces_a_stop_token_and_follows_a_cut_response() -> None:
    batch = token_batch(SAMPLES, [0, 1], closing=CLOSE, packed=False, device="cpu")
    assert batch.input_ids.tolist() == [[1, 2, 3, *CLOSE, 0, 0], [1, 2, 4, 4, 4, *CLOSE]]
    assert batch.targets.tolist() == [3, STOP, 4, 4, 4]  # the stop token was drawn: it stays a target
    assert batch.rows.tolist() == [1, 2, 8, 9, 10]
    assert batch.last.tolist() == [4, 13]
    assert batch.first.tolist() == [2, 9]
    assert batch.response().int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]


@st.composite
def drawn(draw: st.DrawFn) -> Samples:
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=6)
    rows = draw(st.lists(st.tuples(ids, ids, st.booleans()), min_size=1, max_size=8))
    prompts, responses, stopped = (list(column) for column in zip(*rows, strict=True))
    return Samples(prompts, responses, stopped, list(range(len(rows))))


@settings(deadline=None, max_examples=60)
@given(drawn(), st.booleans(), st.booleans())
def test_packed_and_padded_name_the_same_tokens(samples: Samples, closes: bool, packed: bool) -> None:
    closing = CLOSE if closes else []
    batch = token_batch(samples, range(len(samples.prompts)), closing=closing, packed=packed, device="cpu")
    flat, places = batch.input_ids.flatten(), batch.position_ids.flatten()
    assert [len(r) for r in samples.responses] == torch.bincount(batch.sequence).tolist()
    for i, row in enumerate(batch.rows.tolist()):
        n, offset = int(batch.sequence[i]), int(batch.offset[i])
        read = [*samples.prompts[n], *samples.responses[n]]
        place = len(samples.prompts[n]) + offset - 1
        assert places[row] == place
        assert flat[row - place : row + 1].tolist() == read[: place + 1]  # all that came before the token
        assert batch.targets[i] == read[place + 1]
    assert (batch.first <= batch.last).all()
    assert batch.response().sum(1).tolist() == (batch.last - batch.first + 1).tolist()
    for n, row in enumerate(batch.last.tolist()):
        assert places[row] == sequence_length(samples, n, len(closing)) - 1
        if closing:
            assert flat[row - 1 : row + 1].tolist() == closing


@settings(deadline=None, max_examples=60)
@given(drawn(), st.integers(1, 30), st.booleans())
def test_micro_batches_hold_every_sample_once_and_keep_to_the_budget(s: Samples, budget: int, packed: bool) -> None:
    batches = micro_batches(s, range(len(s.prompts)), budget, packed, closing=2)
    assert sorted(i for batch in batches for i in batch) == list(range(len(s.prompts)))
    for batch in batches:
        tokens = token_batch(s, batch, closing=CLOSE, packed=packed, device="cpu").input_ids.numel()
        assert tokens <= budget or len(batch) == 1
    lengths = [sequence_length(s, i, 2) for batch in batches for i in batch]
    assert lengths == sorted(lengths, reverse=True)  # what does not fit fails at once
    assert batches == micro_batches(s, list(reversed(range(len(s.prompts)))), budget, packed, closing=2)


def test_the_mask_is_where_a_token_was_drawn() -> None:
    assert response_mask(SAMPLES, "cpu").tolist() == [[True, True, False], [True] * 3, [True, False, False]]


@pytest.mark.parametrize(
    ("samples", "indices", "message"),
    [
        (SAMPLES, [], "samples: expected at least one in a batch, got none"),
        (Samples([[1]], [[]], [False], [0]), [0], "at least one token in every response, got none in that of row 0"),
        (Samples([[]], [[1]], [False], [0]), [0], "at least one token in every prompt, got none in that of row 0"),
    ],
)
def test_empty_prompts_responses_and_batches_are_refused(samples: Samples, indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_batch(samples, indices, packed=False, device="cpu")
