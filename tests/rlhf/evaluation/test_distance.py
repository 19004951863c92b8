"""The distance from the trust region in `prudent eval`: its numbers, its price in the reward, its refusal."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel, Scorer, fit_trust
from prudent.rlhf.evaluation.evaluate import EvalConfig, run_eval
from prudent.rlhf.evaluation.metrics import evaluate_heads
from prudent.rlhf.evaluation.report import format_metrics


def side(shift: float, distance: float, heads: int = 3, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(60, heads, generator=generator, dtype=torch.float64) + shift
    return SimpleNamespace(
        mean=mean, std=torch.ones_like(mean), distance=distance * torch.linspace(0, 1, 60, dtype=torch.float64)
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_the_price_is_in_the_aggregation_and_in_no_other_reward(heads):
    chosen, rejected = side(3.0, 2.0, heads), side(0.0, 0.0, heads, seed=1)
    free, priced = (
        evaluate_heads(chosen, rejected, aggregation=spec, unit=torch.tensor([0.5]), resamples=100)
        for spec in ("mean", "trust:4")
    )
    name = "single head" if heads == 1 else "mean"
    assert priced["accuracy"][name] == free["accuracy"][name]
    reward = chosen.mean.mean(1) - 4 * 0.5 * chosen.distance.square()
    want = (reward > rejected.mean.mean(1)).double().mean().item()
    assert priced["accuracy"]["trust:4"]["value"] == pytest.approx(want)
    assert want < free["accuracy"][name]["value"] - 0.1


def test_quantiles_share_beyond_the_edge_and_auroc_of_foreign_text():
    own = side(1.0, 1.1), side(0.0, 0.9, seed=1)
    found = evaluate_heads(*own, aggregation="mean", foreign=(side(0, 4.0), side(0, 4.0)), resamples=100)
    distance = found["distance"]
    assert distance["chosen"] == pytest.approx({"median": 0.55, "p95": 1.045, "beyond": 6 / 60}, abs=1e-9)
    assert distance["rejected"]["beyond"] == 0
    assert distance["foreign"]["beyond"] == pytest.approx(0.75)
    assert found["signals"]["own_or_foreign"]["distance"]["value"] > 0.8
    text = format_metrics(found)
    row = next(line for line in text.splitlines() if line.startswith("foreign"))
    assert row.split() == ["foreign", "2.00", "3.80", "75.0", "%"]
    assert any(line.startswith("distance ") and "0.8" in line for line in text.splitlines())


def test_without_a_trust_region_there_is_no_distance_and_the_reason_says_how_to_get_one():
    sides = [SimpleNamespace(mean=s.mean, std=s.std) for s in (side(1, 1), side(0, 1, seed=1))]
    found = evaluate_heads(*sides, aggregation="mean", resamples=100)
    assert found["distance"] is None
    assert "prudent calibrate" in found["reasons"]["distance"]


def test_a_saved_model_with_a_region_is_evaluated_with_its_own_distances(tiny_chat_folder: Path, tmp_path: Path):
    torch.manual_seed(1)
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    words = ("good", "bad", "great", "sad", "nice", "awful")
    rows = [{"prompt": f"the {p} is", "chosen": w, "rejected": f"{w} {w}"} for p in ("food", "film") for w in words]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    items = [{"prompt": row["prompt"], "response": row[key]} for key in ("chosen", "rejected") for row in rows]
    scorer = Scorer(model, tokenizer, progress=False)
    model.score.set_trust(fit_trust(scorer.features(items), head=model.score))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = EvalConfig(model=str(folder), data=str(data), output=tmp_path / "out", pictures=False, resamples=100)
    found = run_eval(config, progress=False).metrics["distance"]
    want = scorer.score(items).distance[: len(rows)]
    assert found["chosen"]["median"] == pytest.approx(float(want.double().quantile(0.5)), rel=1e-4)
    model.score.set_trust(None)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="prudent calibrate --model DIR --data FILE"):
        run_eval(config.model_copy(update={"aggregation": "trust:1"}), progress=False)
