"""Taps: which hidden states are read, how they are written, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prudent.engine.taps import (
    Tap,
    capturing,
    columns_of,
    features_size,
    parse_taps,
    read_taps,
    reads_logprob,
    reads_response,
)


def test_a_negative_layer_counts_from_the_trunks_output() -> None:
    assert parse_taps(["last:-1", "mean:20"], 30) == (Tap("last", 30), Tap("mean", 20))
    assert str(Tap("mean", 20)) == "mean:20"


def test_a_layer_may_be_a_share_of_the_trunk() -> None:
    assert parse_taps(["mean:1/3", "last:2/3", "mean:1/1"], 30) == (Tap("mean", 10), Tap("last", 20), Tap("mean", 30))
    assert parse_taps(["mean:1/3"], 5) == (Tap("mean", 2),)


def test_the_log_probability_of_the_response_fills_two_columns_beside_the_states() -> None:
    taps = parse_taps(["last:-1", "logprob", "mean:2/3"], 30)
    assert list(map(str, taps)) == ["last:30", "logprob", "mean:20"]
    assert features_size(taps, 8) == 18
    assert columns_of(taps, 8) == [slice(0, 8), slice(8, 10), slice(10, 18)]
    assert [(reads_response(part), reads_logprob(part)) for part in (taps[:1], taps[1:2], taps[2:])] == [
        (False, False),
        (True, True),
        (True, False),
    ]


OTHERS = ["last", "first:1", "mean:31", "mean:-32", "mean:4/3", "mean:2/0", "mean:-1/2", "logprob:3", "mean:0.5"]


@pytest.mark.parametrize("texts", [[], ["last:-1", "last:30"], ["logprob", "logprob"], *([text] for text in OTHERS)])
def test_other_taps_are_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="taps: expected"):
        parse_taps(texts, 30)


def test_a_mean_counts_response_tokens_only_and_last_reads_the_pooled_row() -> None:
    states = {1: torch.arange(12.0).view(1, 4, 3)}
    found = read_taps(
        [Tap("last", 2), Tap("mean", 1)], states, -states[1], torch.tensor([2]), torch.tensor([[0, 1, 1, 0]])
    )
    assert found.tolist() == [[-6.0, -7.0, -8.0, 4.5, 5.5, 6.5]]


def test_a_trunk_without_a_list_of_its_layers_is_refused() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("C", (), {"get_text_config": lambda self: self, "num_hidden_layers": 3})()

    with (
        pytest.raises(ValueError, match="expected a list of 3 layers in the trunk, found none in Trunk"),
        capturing(Trunk(), [1]),
    ):
        pass
