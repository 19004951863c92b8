"""Features computed once, kept, reused, resumed, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.rlhf.models import features as module
from prudent.rlhf.models.features import compute_features, model_fingerprint

TEXTS = [f"{a} {b} the film was very {b}" for a in ("good", "bad", "nice") for b in ("food", "hotel", "day", "a a a")]


class Counting(Scorer):
    """A scorer that remembers how many texts it was asked for, and can die after some."""

    calls = 0
    dies_after: int | None = None

    def features(self, items: Any) -> Tensor:
        if self.dies_after is not None and self.calls >= self.dies_after:
            raise KeyboardInterrupt
        self.calls += len(items)
        return super().features(items)


@pytest.fixture(scope="module")
def model(tiny_chat_folder: Path) -> EnsembleRewardModel:
    torch.manual_seed(0)
    return EnsembleRewardModel.from_trunk(str(tiny_chat_folder), dtype=torch.float32).eval()


@pytest.fixture
def scorer(model: EnsembleRewardModel, tiny_chat_folder: Path) -> Counting:
    return Counting(model, AutoTokenizer.from_pretrained(tiny_chat_folder), progress=False)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_TOKENS", 20)


@pytest.mark.usefixtures("small_shards")
def test_each_distinct_text_is_computed_once_and_then_read(scorer: Counting, tmp_path: Path) -> None:
    items = TEXTS + TEXTS[::-1]
    found = compute_features(scorer, items, tmp_path, progress=False).features
    assert scorer.calls == len(TEXTS)
    torch.testing.assert_close(found, Scorer.features(scorer, items), rtol=1e-5, atol=1e-5)
    again = compute_features(scorer, items, tmp_path, progress=False).features
    more = compute_features(scorer, [*items, "a new day"], tmp_path, progress=False).features
    assert torch.equal(again, found)
    assert torch.equal(more[:-1], found)
    assert scorer.calls == len(TEXTS) + 1


@pytest.mark.usefixtures("small_shards")
def test_a_killed_job_goes_on_and_gets_the_same_bits(scorer: Counting, tmp_path: Path) -> None:
    whole = compute_features(scorer, TEXTS, tmp_path / "whole", progress=False).features
    scorer.calls, scorer.dies_after = 0, 5
    with pytest.raises(KeyboardInterrupt):
        compute_features(scorer, TEXTS, tmp_path / "killed", progress=False)
    done, scorer.calls, scorer.dies_after = scorer.calls, 0, None
    assert torch.equal(compute_features(scorer, TEXTS, tmp_path / "killed", progress=False).features, whole)
    assert scorer.calls == len(TEXTS) - done


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_is_computed_again(scorer: Counting, tmp_path: Path) -> None:
    whole = compute_features(scorer, TEXTS, tmp_path, progress=False).features
    shard = next(iter(tmp_path.rglob("*.safetensors")))
    shard.write_bytes(shard.read_bytes()[:-7])
    scorer.calls = 0
    assert torch.equal(compute_features(scorer, TEXTS, tmp_path, progress=False).features, whole)
    assert 0 < scorer.calls < len(TEXTS)


def test_another_trunk_does_not_find_these_features(scorer: Counting, tmp_path: Path) -> None:
    compute_features(scorer, TEXTS, tmp_path, progress=False)
    with torch.no_grad():
        scorer.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
        compute_features(scorer, TEXTS, tmp_path, progress=False)
        scorer.model.model.layers[0].mlp.up_proj.weight[0, 0] -= 1e-3
    assert scorer.calls == 2 * len(TEXTS)


def test_the_head_does_not_change_the_fingerprint(model: EnsembleRewardModel) -> None:
    before = model_fingerprint(model)
    model.score.reset_parameters()
    assert model_fingerprint(model) == before


def test_the_trunks_dtype_is_kept(tiny_chat_folder: Path, tmp_path: Path) -> None:
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), dtype=torch.bfloat16).eval()
    scorer = Scorer(model, AutoTokenizer.from_pretrained(tiny_chat_folder), progress=False)
    found = compute_features(scorer, TEXTS, tmp_path, progress=False).features
    assert found.dtype == torch.bfloat16
    assert torch.equal(compute_features(scorer, TEXTS, tmp_path, progress=False).features, found)


def test_features_that_are_not_finite_are_refused_by_item(scorer: Counting, tmp_path: Path) -> None:
    class Broken(Counting):
        def features(self, items: Any) -> Tensor:
            result = super().features(items)
            result[0] = float("nan")
            return result

    broken = Broken(scorer.model, scorer._encoder.tokenizer, progress=False)
    with pytest.raises(ValueError, match=r"features: expected finite hidden states, got NaN or infinity for item \d+"):
        compute_features(broken, TEXTS, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"Scorer: item 1: expected some text, got an empty string"):
        compute_features(scorer, ["a", ""], tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"Scorer: line 7: expected some text, got an empty string"):
        compute_features(scorer, ["a", ""], tmp_path, progress=False, names=["line 4", "line 7"])
    with pytest.raises(ValueError, match="expected at least one text, got none"):
        compute_features(scorer, [], tmp_path, progress=False)
