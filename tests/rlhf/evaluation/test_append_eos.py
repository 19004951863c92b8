"""`append_eos` of `prudent score` and `prudent eval`: whether another trainer's classifier reads EOS after a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prudent import EnsembleRewardModel
from prudent.rlhf.evaluation.evaluate import EvalConfig, run_eval
from prudent.rlhf.evaluation.score import ScoreConfig, run_score


@pytest.fixture
def folder(tiny_chat_folder, tmp_path) -> Path:
    """classifier/ and ensemble/ on plain texts, the ensemble trained without EOS; row.jsonl and pair.jsonl."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    tokenizer.chat_template = None
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_chat_folder, num_labels=1)
    torch.nn.init.normal_(classifier.score.weight)
    ensemble = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=2, append_eos=False)
    for name, model in (("classifier", classifier), ("ensemble", ensemble)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "row.jsonl").write_text(json.dumps({"prompt": "my day was ", "response": "great"}) + "\n")
    pairs = [{"prompt": f"my {word} ", "chosen": "was great", "rejected": "was bad"} for word in ("day", "food")]
    (tmp_path / "pair.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def scored(folder: Path, model: str, append_eos: bool | None) -> float:
    output = folder / f"{model}.{append_eos}.jsonl"
    data = str(folder / "row.jsonl")
    config = ScoreConfig(model=str(folder / model), data=data, output=str(output), append_eos=append_eos)
    run_score(config, progress=False)
    reward: float = json.loads(output.read_text())["reward"]
    return reward


def evaluated(folder: Path, **given) -> None:
    models = {name: str(folder / model) for name, model in given.items() if name != "append_eos"}
    output = folder / "-".join(map(str, given.values()))
    data = {"data": str(folder / "pair.jsonl"), "resamples": 100, "pictures": False}
    run_eval(EvalConfig(output=output, append_eos=given["append_eos"], **models, **data), progress=False)


@torch.no_grad()
def test_a_classifier_is_scored_on_what_its_trainer_fed_it(folder):
    own = AutoModelForSequenceClassification.from_pretrained(folder / "classifier")
    plain = AutoTokenizer.from_pretrained(folder / "classifier")("my day was great", return_tensors="pt")["input_ids"]
    ended = torch.cat([plain, torch.tensor([[own.config.eos_token_id]])], dim=1)
    for append_eos, read in ((None, ended), (True, ended), (False, plain)):
        assert scored(folder, "classifier", append_eos) == pytest.approx(own(read).logits.item(), abs=1e-5)


def test_an_ensemble_has_a_setting_that_the_key_must_match(folder):
    assert scored(folder, "ensemble", None) == scored(folder, "ensemble", False)
    with pytest.raises(ValueError, match=r"append_eos: expected False, with which model .* was trained, .*, got True"):
        scored(folder, "ensemble", True)
    with pytest.raises(ValueError, match="append_eos: expected False, with which model"):
        evaluated(folder, model="ensemble", append_eos=True)


def test_with_two_models_the_key_is_for_the_one_without_a_setting(folder):
    evaluated(folder, model="ensemble", compare="classifier", append_eos=True)
    evaluated(folder, model="classifier", compare="ensemble", append_eos=True)
    evaluated(folder, model="classifier", compare="classifier", append_eos=False)
    with pytest.raises(ValueError, match="append_eos: expected False, with which model"):
        evaluated(folder, model="ensemble", compare="ensemble", append_eos=True)
