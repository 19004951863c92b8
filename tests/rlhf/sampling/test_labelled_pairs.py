"""Pairs made by a gold scorer: right order, exact share of flips, ties counted."""

from __future__ import annotations

import pytest
import torch

from prudent.rlhf.sampling.labelled_pairs import make_pairs
from prudent.rlhf.sampling.stored import Rollout

GOLD = [torch.tensor([0.0, 0.5, 0.5, -1.0]), torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.9, 0.8, 0.7, 0.6])]
ROLLOUTS = [Rollout(f"p{i}", [f"r{i}{j}" for j in range(4)], [True] * 4, torch.randn(4, 3)) for i in range(3)]


def test_every_pair_is_in_gold_order_and_ties_are_counted() -> None:
    pairs = make_pairs(GOLD, [0, 1, 2], 6, 0.25, seed=0)
    assert (pairs.drawn, pairs.ties, len(pairs.better)) == (18, 1, 17)
    for p, better, worse in zip(pairs.prompt, pairs.better, pairs.worse, strict=True):
        assert GOLD[p][better] > GOLD[p][worse]


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5])
def test_the_share_of_flipped_labels_is_exact_and_seeded(noise: float) -> None:
    first, again, other = (make_pairs(GOLD, [0, 1, 2], 6, noise, seed=s) for s in (1, 1, 2))
    assert int(first.flipped.sum()) == round(noise * 17)
    assert torch.equal(first.flipped, again.flipped)
    assert noise == 0 or not torch.equal(first.flipped, other.flipped)


def test_only_the_given_prompts_and_so_many_pairs_are_drawn() -> None:
    pairs = make_pairs(GOLD, [1, 2], 3, 0.0, seed=0)
    assert (set(pairs.prompt), pairs.drawn) == ({1, 2}, 6)
    assert len(set(zip(pairs.prompt, pairs.better, pairs.worse, strict=True))) == 6


def test_of_more_pairs_so_many_are_kept_and_their_flips_are_exact() -> None:
    pairs = make_pairs(GOLD, [0, 1, 2], 6, 0.25, seed=0, at_most=8)
    assert (len(pairs.better), int(pairs.flipped.sum()), pairs.drawn, pairs.ties) == (8, 2, 18, 1)
    assert len(set(zip(pairs.prompt, pairs.better, pairs.worse, strict=True))) == 8
    assert len(make_pairs(GOLD, [0, 1, 2], 6, 0.25, seed=0, at_most=99).better) == 17


def test_noisy_features_and_rows_swap_exactly_the_flipped_pairs() -> None:
    pairs = make_pairs(GOLD, [0, 1, 2], 6, 0.25, seed=0)
    true, noisy = pairs.features(ROLLOUTS, noisy=False), pairs.features(ROLLOUTS, noisy=True)
    for i, flipped in enumerate(pairs.flipped.tolist()):
        expected = (true[1][i], true[0][i]) if flipped else (true[0][i], true[1][i])
        assert torch.equal(noisy[0][i], expected[0])
        assert torch.equal(noisy[1][i], expected[1])
    rows = pairs.rows(ROLLOUTS, GOLD, noisy=True)
    assert [row["gold_chosen"] < row["gold_rejected"] for row in rows] == pairs.flipped.tolist()
    assert all(row["gold_chosen"] > row["gold_rejected"] for row in pairs.rows(ROLLOUTS, GOLD, noisy=False))


def test_nothing_but_ties_is_refused() -> None:
    with pytest.raises(ValueError, match="got 6 ties of 6"):
        make_pairs([torch.zeros(4)], [0], 6, 0.25, seed=0)
