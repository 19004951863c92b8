"""Taps: which hidden states are read, how they are written, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prudent.engine.taps import Tap, capturing, parse_taps, read_taps


def test_a_negative_layer_counts_from_the_trunks_output() -> None:
    assert parse_taps(["last:-1", "mean:20"], 30) == (Tap("last", 30), Tap("mean", 20))
    assert str(Tap("mean", 20)) == "mean:20"


@pytest.mark.parametrize("texts", [[], ["last"], ["first:1"], ["mean:31"], ["mean:-32"], ["last:-1", "last:30"]])
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
