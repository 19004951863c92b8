"""What a training run starts from: data and models that are there, or a classifier of another trainer as stage 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prudent.engine import EnsembleRewardModel
from prudent.rlhf.job.config import load_config
from prudent.rlhf.reward.start import check_given
from prudent.rlhf.reward.train import TrainConfig, run_train


def test_heads_on_a_classifiers_trunk_read_the_token_that_its_own_head_reads(
    tiny_chat_folder: Path, tmp_path: Path
) -> None:
    given = tmp_path / "classifier"
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_chat_folder, num_labels=1)
    classifier.config.pad_token_id = eos = classifier.config.eos_token_id
    classifier.save_pretrained(given)
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(given)
    pairs = [
        {"prompt": f"the {it} was", "chosen": "good", "rejected": "bad"} for it in ("day", "food", "hotel", "film")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sets = ["brme.epochs=2", "brme.num_heads=2", "eval_fraction=0.0", "mode=head", f"stage1={given}"]
    data, output = str(tmp_path / "pairs.jsonl"), tmp_path / "run"
    run_train(load_config(TrainConfig, None, sets, model=str(given), data=data, output=output), progress=False)
    model = EnsembleRewardModel.from_pretrained(output / "model")
    assert model.config.skip_token_id == eos
    ended = torch.tensor([[5, 6, 7, eos]])
    torch.testing.assert_close(model.features(ended), model.features(ended[:, :3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [("", "expected a file, a folder or a hub name, got an empty string"), ("no.jsonl", "no such file")],
)
def test_data_that_is_not_there_is_refused_before_any_model_is_looked_up(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^data: .*{says}"):
        check_given(TrainConfig(model=str(tmp_path / "nowhere"), data=name, output=tmp_path / "run"), "head")
