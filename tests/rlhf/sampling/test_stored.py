"""Stored rollouts: the same file whether or not the run was interrupted, and refusals that name what differs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prudent.rlhf.sampling import stored as rollout
from prudent.rlhf.sampling.stored import Request, plan, sample, uniforms
from prudent.rlhf.sampling.tokens import Sampling
from prudent.rlhf.sampling.turn import Turn

REQUESTS = [
    Request("the food was", 6),
    Request("my day", 6),
    Request("it was a long film", 6),
    Request("the hotel was", 6),
    Request("your train", 20),
]
SAMPLING = Sampling(8)


@pytest.fixture(scope="module")
def chat(tiny_chat_folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_folder).eval()
    return model, AutoTokenizer.from_pretrained(tiny_chat_folder)


def _sample(chat: tuple[Any, Any], folder: Path, requests: list[Request] = REQUESTS, **options: Any) -> Any:
    return sample(*chat, requests, folder, SAMPLING, batch_rows=12, progress=False, **options)


def test_each_prompt_gets_its_responses_and_features_in_order(chat: tuple[Any, Any], tmp_path: Path) -> None:
    rollouts = _sample(chat, tmp_path)
    assert [r.prompt for r in rollouts] == [r.prompt for r in REQUESTS]
    assert [len(r.responses) for r in rollouts] == [6, 6, 6, 6, 20]
    assert [tuple(r.features.shape) for r in rollouts] == [(n, 32) for n in (6, 6, 6, 6, 20)]
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == [0, 1, 2, 3, 4]
    assert {len(set(r.responses)) for r in rollouts} != {1}


def test_the_same_seed_gives_the_same_samples_and_another_gives_others(chat: tuple[Any, Any], tmp_path: Path) -> None:
    first, again, other = (_sample(chat, tmp_path / name, seed=s) for name, s in (("a", 3), ("b", 3), ("c", 4)))
    assert [r.responses for r in first] == [r.responses for r in again]
    assert [r.responses for r in first] != [r.responses for r in other]


@pytest.mark.parametrize("calls", [1, 3, 11])
def test_an_interrupted_run_goes_on_to_the_same_file(
    chat: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    whole = _sample(chat, tmp_path / "whole")
    usual, count = rollout.sample_batch, 0

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal count
        for step in usual(*args, **kwargs):
            count += 1
            if count > calls:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(rollout, "sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _sample(chat, tmp_path / "cut")
    monkeypatch.setattr(rollout, "sample_batch", usual)
    resumed = _sample(chat, tmp_path / "cut")
    assert (tmp_path / "cut/samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()
    assert all(torch.equal(a.features, b.features) for a, b in zip(whole, resumed, strict=True))


def test_a_torn_last_line_is_repaired(chat: tuple[Any, Any], tmp_path: Path) -> None:
    _sample(chat, tmp_path)
    file = tmp_path / "samples.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    _sample(chat, tmp_path)
    assert file.read_bytes() == whole


def test_a_finished_rollout_does_not_touch_the_model(
    chat: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _sample(chat, tmp_path)
    monkeypatch.setattr(rollout, "sample_batch", None)
    assert [r.responses for r in _sample(chat, tmp_path)] == [r.responses for r in first]


def test_lost_features_are_made_again(chat: tuple[Any, Any], tmp_path: Path) -> None:
    first = _sample(chat, tmp_path)
    whole = (tmp_path / "samples.jsonl").read_bytes()
    next((tmp_path / "features").iterdir()).unlink()
    again = _sample(chat, tmp_path)
    assert (tmp_path / "samples.jsonl").read_bytes() == whole
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, again, strict=True))


def test_a_broken_file_is_named(chat: tuple[Any, Any], tmp_path: Path) -> None:
    _sample(chat, tmp_path)
    features, samples = next((tmp_path / "features").iterdir()), tmp_path / "samples.jsonl"
    os.truncate(features, 100)
    with pytest.raises(ValueError, match=rf"{features.name}: its weights cannot be read"):
        _sample(chat, tmp_path)
    samples.write_text("{\n" + samples.read_text())
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1: expected a JSON object"):
        _sample(chat, tmp_path)


def test_other_prompts_in_the_folder_are_refused(chat: tuple[Any, Any], tmp_path: Path) -> None:
    _sample(chat, tmp_path)
    with pytest.raises(ValueError, match="expected responses to the present prompts, got 'my day' with 6"):
        _sample(chat, tmp_path, [Request("my day", 6), *REQUESTS[2:]])


def test_a_prompt_given_twice_is_refused(chat: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected different ones"):
        _sample(chat, tmp_path, [REQUESTS[0], REQUESTS[0]])


def test_a_prompt_that_leaves_no_room_is_refused(chat: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most 119 tokens each, .* the model's 128 positions, got 203: 'food food"):
        _sample(chat, tmp_path, [REQUESTS[0], Request("food " * 200, 2)])


def test_batches_hold_one_length_and_one_count_and_every_prompt_once() -> None:
    lengths, samples = [5, 6, 5, 5, 5, 6], [4, 4, 4, 4, 256, 4]
    batches = plan(lengths, samples, batch_rows=8)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        assert len({(lengths[i], samples[i]) for i in batch}) == 1
        assert len(batch) == 1 or sum(samples[i] for i in batch) <= 8


def test_prompts_that_differ_by_at_most_the_spread_share_a_batch() -> None:
    lengths, samples = [9, 5, 6, 8, 7, 5], [2, 2, 2, 2, 2, 3]
    assert plan(lengths, samples, batch_rows=6, spread=2) == [[1, 2, 4], [5], [0, 3]]
    assert plan(lengths, samples, batch_rows=6, spread=0) == plan(lengths, samples, batch_rows=6)


def test_a_prompts_numbers_do_not_depend_on_the_other_prompts() -> None:
    a = uniforms(Request("a", 3), SAMPLING, 0)
    assert torch.equal(a, uniforms(Request("a", 3), SAMPLING, 0))
    assert not torch.equal(a, uniforms(Request("b", 3), SAMPLING, 0))
    assert not torch.equal(a, uniforms(Request("a", 3), SAMPLING, 1))


def test_a_response_keeps_the_blank_it_begins_with(shared_dir: Path) -> None:
    """Joined to its prompt again, it reads as it was drawn; a SentencePiece tokeniser decodes `▁He` alone as `He`."""
    folder = shared_dir / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = Turn(tokenizer, AutoModelForCausalLM.from_pretrained(folder))
    prompt = turn.prompt("One day, Lily saw a frog.")
    whole = turn.prompt("One day, Lily saw a frog. He was green.")
    assert turn.text(prompt, whole[len(prompt) :]) == " He was green."
    assert tokenizer.decode(whole[len(prompt) :]) == "He was green."
