"""Given texts get the features that sampled texts have, and an interrupted reading continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prudent.rlhf.models.loading import load_language_model, load_tokenizer
from prudent.rlhf.sampling import read_texts as module
from prudent.rlhf.sampling.read_texts import read_texts
from prudent.rlhf.sampling.stored import Request, sample
from prudent.rlhf.sampling.tokens import Sampling

TAPS = ["last:-1", "mean:1", "logprob"]


@pytest.fixture(scope="module")
def loaded(tiny_chat_folder: Path) -> tuple[Any, Any]:
    model = load_language_model("model", str(tiny_chat_folder), torch.float32).eval()
    return model, load_tokenizer("model", str(tiny_chat_folder))


def test_a_sampled_text_read_again_has_the_features_that_it_had(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    requests = [Request("the food was", 4), Request("my day", 4)]
    found = sample(*loaded, requests, tmp_path / "own", Sampling(6, 1.0, 0, 1.0), taps=TAPS, progress=False)
    texts = [(rollout.prompt, text) for rollout in found for text in rollout.responses]
    again = read_texts(*loaded, texts, TAPS, tmp_path / "read", progress=False)
    torch.testing.assert_close(again, torch.cat([rollout.features for rollout in found]), rtol=1e-4, atol=1e-4)


def test_what_was_read_is_not_read_again_and_other_texts_are_refused(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [("the food was", word) for word in ("good", "good good good", "", "a train")]
    whole = read_texts(*loaded, texts, TAPS, tmp_path / "whole", chunk=2, progress=False)
    read_texts(*loaded, texts[:2], TAPS, tmp_path / "cut", chunk=2, progress=False)
    usual, rows = module.forward, []
    monkeypatch.setattr(module, "forward", lambda *given: rows.append(len(given[1])) or usual(*given))
    assert torch.equal(read_texts(*loaded, texts, TAPS, tmp_path / "cut", chunk=2, progress=False), whole)
    assert rows == [2]
    with pytest.raises(ValueError, match="expected the features of the present texts; name another output folder"):
        read_texts(*loaded, texts[::-1], TAPS, tmp_path / "cut", chunk=2, progress=False)
