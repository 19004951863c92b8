"""A model folder that names code of its own is refused at once, without a prompt and without running it."""

from __future__ import annotations

import builtins
import json

import pytest
import transformers

from prudent.engine import EnsembleRewardModel

CONFIG = "from transformers import LlamaConfig\n\n\nclass MyConfig(LlamaConfig):\n    model_type = 'my_lm'\n\n\n"
MODEL = """
from torch import nn
from transformers import LlamaForSequenceClassification, LlamaModel, LlamaPreTrainedModel

from .configuration_my import MyConfig


class MyModel(LlamaModel):
    config_class = MyConfig


class MyReward(LlamaForSequenceClassification):
    config_class = MyConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels, self.model = 1, MyModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()


"""


@pytest.fixture
def own_code(make_classifier, tmp_path):
    """A one-head classifier whose configuration and model are Python files beside the weights; each file tells."""
    make_classifier().save_pretrained(tmp_path / "own")
    folder = tmp_path / "own"
    tells = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "configuration_my.py").write_text(CONFIG + tells)
    (folder / "modeling_my.py").write_text(MODEL + tells)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_my.MyConfig",
        "AutoModel": "modeling_my.MyModel",
        "AutoModelForSequenceClassification": "modeling_my.MyReward",
    }
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "my_lm"}))
    return folder


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    def asked(*_):
        pytest.fail("a question was asked")

    monkeypatch.setattr(builtins, "input", asked)


@pytest.mark.parametrize("load", ["from_trunk", "from_sequence_classifier"])
def test_code_beside_the_weights_is_refused_and_not_run(own_code, tmp_path, load):
    with pytest.raises(
        ValueError, match=r"own: needs code of its own .*, which prudent does not run: use a version"
    ) as e:
        getattr(EnsembleRewardModel, load)(own_code)
    assert "trust_remote_code" not in str(e.value)  # no key of ours has that name
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_names_code_but_is_of_a_known_family_loads_with_the_known_code(own_code, tmp_path):
    config = json.loads((own_code / "config.json").read_text())
    (own_code / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    EnsembleRewardModel.from_sequence_classifier(own_code)
    assert not (tmp_path / "ran").exists()


def test_a_caller_in_python_may_allow_it_or_give_the_instance(own_code, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    auto = transformers.AutoModelForSequenceClassification
    original = auto.from_pretrained(own_code, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    given = EnsembleRewardModel.from_sequence_classifier(original)
    allowed = EnsembleRewardModel.from_sequence_classifier(own_code, trust_remote_code=True)
    assert type(given.model).__name__ == type(allowed.model).__name__ == "MyModel"
