"""`prudent score` and `prudent eval` of a model that averages over the response."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.rlhf.evaluation.evaluate import EvalConfig, run_eval
from prudent.rlhf.evaluation.score import ScoreConfig, run_score
from prudent.rlhf.models.loading import load_reward

from ..sentiment import write_pairs


@pytest.fixture
def wide(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3, taps="wide")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_score_and_eval_know_where_each_response_begins(wide: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", ("very",))
    run_score(ScoreConfig(model=str(wide), data=str(pairs), output=str(tmp_path / "scored.jsonl")), progress=False)
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    scorer = Scorer(EnsembleRewardModel.from_pretrained(wide), AutoTokenizer.from_pretrained(wide), progress=False)
    items = [{"prompt": row["prompt"], "response": row[side]} for row in rows for side in ("chosen", "rejected")]
    wanted = scorer.score(items).reward
    got = [row["scores"][side]["reward"] for row in rows for side in ("chosen", "rejected")]
    assert got == pytest.approx(wanted, abs=1e-5)
    assert len({scorer.read(item).start for item in items} - {0}) == 1
    right = sum(a > b for a, b in zip(wanted[::2], wanted[1::2], strict=True)) / len(rows)
    for name, cache in (("plain", {}), ("cached", {"feature_cache": tmp_path / "cache"})):
        config = EvalConfig(model=str(wide), data=str(pairs), output=tmp_path / name, pictures=False, **cache)
        found = run_eval(config, progress=False).metrics["accuracy"]["tradeoff:0.4"]["value"]
        assert found == pytest.approx(right)


def test_one_trunk_with_other_taps_shares_no_features(wide: Path, tiny_chat_folder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", ("not",))
    reward = load_reward("model", str(wide))
    last = EnsembleRewardModel.from_trunk(reward.model.model, num_heads=3)
    last.save_pretrained(tmp_path / "last")
    reward.tokenizer.save_pretrained(tmp_path / "last")
    for name in (wide, tmp_path / "last"):
        config = EvalConfig(model=str(name), data=str(pairs), output=tmp_path / f"{name.name}.eval", pictures=False)
        config = config.model_copy(update={"feature_cache": tmp_path / "cache", "compare": str(wide)})
        metrics = run_eval(config, progress=False).metrics
        assert metrics["features"]["width"] == (64 if name == wide else 32)
    assert len(list((tmp_path / "cache").iterdir())) == 2
