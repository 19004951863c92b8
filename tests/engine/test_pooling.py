"""Padding moved to the right, and the token of each sequence that the heads read."""

from __future__ import annotations

import pytest
import torch

from prudent.engine.pooling import pooled_rows, right_padded

IDS = torch.tensor([[7, 7, 3, 4, 5], [3, 7, 4, 7, 7], [3, 4, 5, 6, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_attended_tokens_move_to_the_front_in_their_order():
    ids, mask, positions = right_padded(IDS, MASK, torch.arange(5)[None], 9)
    assert ids.tolist() == [[3, 4, 5, 9, 9], [3, 4, 9, 9, 9], [3, 4, 5, 6, 8]]
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert positions[MASK.sum(1).ne(0)].tolist()[0][:3] == [2, 3, 4]
    assert right_padded(IDS, MASK, None, 9)[2] is None


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_kind_of_number_will_do(kind):
    ids, mask, _ = right_padded(IDS, MASK.to(kind), None, 9)
    assert ids.tolist()[0] == [3, 4, 5, 9, 9]
    assert mask.dtype == torch.int64


@pytest.mark.parametrize(
    ("first", "skipped", "rows"),
    [(True, None, [0, 5, 10]), (False, None, [2, 6, 14]), (False, 5, [1, 6, 14]), (False, 4, [2, 5, 14])],
)
def test_the_row_read_is_the_first_or_the_last_that_is_not_the_skipped_token(first, skipped, rows):
    ids, mask, _ = right_padded(IDS, MASK, None, 9)
    assert pooled_rows(ids, mask, first=first, skipped=skipped).tolist() == rows


def test_without_a_mask_every_token_counts():
    assert pooled_rows(IDS, None, first=False, skipped=None).tolist() == [4, 9, 14]
    assert pooled_rows(IDS, None, first=False, skipped=7).tolist() == [4, 7, 14]
    assert pooled_rows(torch.full((1, 3), 7), None, first=False, skipped=7).tolist() == [0]
