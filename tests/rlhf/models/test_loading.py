"""Load the rewards, language models and tokenisers that a config names; errors are one sentence with the key."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prudent.engine import EnsembleRewardModel
from prudent.rlhf.job import files
from prudent.rlhf.job.files import refuse_mistyped
from prudent.rlhf.models.loading import (
    load_language_model,
    load_reward,
    load_reward_config,
    load_tokenizer,
    load_trunk,
    model_folder,
    says_append_eos,
)


@pytest.fixture
def lm(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    """A copy of the causal language model that may be broken."""
    return Path(shutil.copytree(tiny_chat_folder, tmp_path / "lm"))


@pytest.fixture
def run(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    """What `prudent train` leaves: model/ with the ensemble, adapter/ with a LoRA (here its configuration alone)."""
    torch.manual_seed(0)
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=2)
    model.save_pretrained(tmp_path / "run" / "model")
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def classifier(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    """A one-head classifier of another trainer on plain texts, whose padding token is its EOS token."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_chat_folder, num_labels=1)
    model.config.pad_token_id = model.config.eos_token_id
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, None
    tokenizer.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    return cut


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("load", "breaks", "says"),
    [
        (load_language_model, _cut("model.safetensors"), "model: {}: its weights cannot be read (Error while"),
        (load_trunk, _cut("model.safetensors"), "model: {}: its weights cannot be read (Error while"),
        (load_language_model, _without("model.safetensors"), "model: expected a causal language model's folder or hub"),
        (load_language_model, _cut("config.json"), "got the folder {}: It looks like the config file at"),
        (load_reward, _cut("config.json"), "model: expected a reward model's folder or hub name, got the folder"),
        (
            load_reward,
            lambda _: None,
            "model: {}: expected a reward model, got LlamaForCausalLM, a model without a reward head",
        ),
        (load_tokenizer, _without("tokenizer.json"), "got the folder {}: it has none"),
        (load_tokenizer, _cut("tokenizer.json"), "got the folder {}: its tokeniser cannot be read ("),
        (load_tokenizer, lambda f: (f / "tokenizer.json").write_text("[]"), "its tokeniser cannot be read ("),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_sentence_with_the_key_and_the_folder(
    lm: Path, load: Callable[[str, str], object], breaks: Callable[[Path], None], says: str
) -> None:
    breaks(lm)
    with pytest.raises(ValueError, match=re.escape(says.format(lm))) as raised:
        load("model", str(lm))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("model: ")
    assert str(lm) in str(raised.value)


def test_a_cut_reward_model_is_named_by_the_key_that_gave_it(run: Path) -> None:
    _cut("model.safetensors")(run / "model")
    with pytest.raises(ValueError, match=re.escape(f"compare: {run / 'model'}: its weights cannot be read (")):
        load_reward("compare", str(run))


def test_a_run_folder_stands_for_the_model_in_it(run: Path) -> None:
    assert model_folder(run) == str(run / "model")
    assert model_folder(run / "model") == str(run / "model")
    assert load_reward("model", str(run)).scorer().model.config.num_heads == 2


def test_a_reward_has_one_model_and_one_tokeniser_however_often_they_are_asked_for(run: Path) -> None:
    reward = load_reward("model", str(run))
    assert reward.source == str(run / "model")
    assert reward.tokenizer is reward.tokenizer
    assert reward.scorer().model is reward.scorer().model is reward.model


@torch.no_grad()
def test_a_classifier_whose_padding_is_eos_scores_as_it_does_itself_alone_and_in_company(classifier: Path) -> None:
    own = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    texts = ["my day was great", "the food", "the film was very very boring and bad and long"]
    want = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])  # as its trainer fed it
        want.append(own(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
    scorer = load_reward("model", str(classifier)).scorer()
    assert scorer.encode(texts[0])[-1] == tokenizer.eos_token_id
    assert scorer.score(texts).reward == pytest.approx(want, abs=1e-5)
    assert [scorer.score([text]).reward[0] for text in texts] == pytest.approx(want, abs=1e-5)
    scorer.model.save_pretrained(classifier.parent / "saved")
    tokenizer.save_pretrained(classifier.parent / "saved")
    saved = load_reward("model", str(classifier.parent / "saved")).scorer()
    assert saved.score(texts).reward == pytest.approx(want, abs=1e-5)


@torch.no_grad()
def test_the_same_where_a_chat_template_ends_in_that_token(classifier: Path, tiny_chat_folder: Path) -> None:
    own = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)  # its template ends a turn with the EOS token
    tokenizer.save_pretrained(classifier)
    chats = [
        [{"role": "user", "content": "the food ?"}, {"role": "assistant", "content": said}] for said in ("bad", "so so")
    ]
    want = []
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == own.config.pad_token_id
        want.append(own(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
    assert load_reward("model", str(classifier)).scorer().score(chats).reward == pytest.approx(want, abs=1e-5)


def test_append_eos_is_said_of_a_classifier_and_known_of_an_ensemble(run: Path, classifier: Path) -> None:
    scorer = load_reward("model", str(classifier), append_eos=False).scorer()
    assert scorer.encode("my day") == load_reward("model", str(classifier)).scorer().encode("my day")[:-1]
    load_reward("model", str(run), append_eos=True)
    with pytest.raises(
        ValueError, match=r"append_eos: expected True, with which model .*/run/model was trained, or null"
    ):
        load_reward("model", str(run), append_eos=False)
    assert (says_append_eos("model", str(run)), says_append_eos("model", str(classifier))) == (True, False)


@pytest.mark.parametrize("load", [load_reward, load_trunk, load_language_model, load_tokenizer, load_reward_config])
def test_a_folder_with_code_of_its_own_is_refused_without_a_question(
    lm: Path, load: Callable[[str, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        pytest.fail("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    config = json.loads((lm / "config.json").read_text())
    named = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": [None, "code.T"]}
    (lm / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": named}))
    settings = json.loads((lm / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": named}
    (lm / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=f"model: {re.escape(str(lm))}: needs code of its own .*, which prudent does not"
    ):
        load("model", str(lm))


def test_an_adapter_or_a_run_folder_where_a_model_is_expected_leads_to_the_model(run: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter, a LoRA without its base model \(the merged model is .*run/model\)"):
        load_reward("model", str(run / "adapter"))
    with pytest.raises(ValueError, match=r"run, a run folder whose model is .*run/model: "):
        load_language_model("model", str(run))


def test_a_reward_model_where_a_language_model_is_expected_is_refused_in_few_words(run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model: expected a causal language model, got the reward model .*, which cannot generate"
    ) as raised:
        load_language_model("model", str(run / "model"))
    assert len(str(raised.value)) < 600 + len(str(run))


def test_a_language_model_that_lacks_tensors_is_refused(lm: Path) -> None:
    config = json.loads((lm / "config.json").read_text())
    (lm / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"model: '.*': expected every tensor of the model in the checkpoint"):
        load_language_model("model", str(lm))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "expected a file, a folder or a hub name, got an empty string"),
        ("/no/such", "no such file or folder"),
        ("./here", "no such file or folder"),
        ("runs/reward/model", "no such file or folder"),
        ("runs/mdoel", "no such file or folder (not looked up on the hub, because runs is a local folder)"),
    ],
)
def test_a_mistyped_path_is_refused_before_a_hub_is_asked(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        refuse_mistyped("model", name)
    assert str(raised.value).startswith("model: ")


@pytest.mark.parametrize("name", ["runs/model", "gpt2", "google/gemma-2b", "runs/cached"])
def test_an_existing_path_or_a_possible_hub_name_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "HF_HUB_CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "models--runs--cached").mkdir(parents=True)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    refuse_mistyped("model", name)
