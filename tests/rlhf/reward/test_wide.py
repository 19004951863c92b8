"""`prudent train` with features=wide: heads on a mean over the response too, in every mode and stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, GPTJConfig, GPTJForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.rlhf.data.pairs import load_pairs, split_by_prompt
from prudent.rlhf.job.config import load_config
from prudent.rlhf.reward.pet import stage
from prudent.rlhf.reward.train import TrainConfig, run_train
from prudent.rlhf.reward.trunk import collate

from ..sentiment import write_pairs

TAPS = ["last:2", "mean:1"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentiment pairs: 6 prompts, 36 pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", ("very",))


def _config(model: Path, data: Path, output: Path, *sets: str) -> TrainConfig:
    base = ["features=wide", "eval_fraction=0.34", "brme.num_heads=2"]
    return load_config(TrainConfig, None, [*base, *sets], model=str(model), data=str(data), output=output)


def _scorer(folder: Path) -> Scorer:
    return Scorer(EnsembleRewardModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), progress=False)


@pytest.mark.parametrize("mode", ["head", "full", "lora"])
def test_the_saved_model_reads_what_was_trained_and_measured(
    tiny_chat_folder: Path, pairs: Path, tmp_path: Path, mode: str
) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    sets = (
        ["bt.solver=adamw", "bt.epochs=3", "brme.epochs=3"]
        if mode == "head"
        else ["trunk.max_steps=2", "trunk.lr=0.01"]
    )
    result = run_train(_config(tiny_chat_folder, pairs, tmp_path / "run", f"mode={mode}", *sets), progress=False)
    for name in ("stage1", "model"):
        assert json.loads((tmp_path / "run" / name / "config.json").read_text())["taps"] == TAPS
    scorer = _scorer(tmp_path / "run" / "model")
    assert scorer.model.score.hidden_size == 64
    _, held = split_by_prompt(load_pairs(pairs).pairs, 0.34, 0)
    items = [item for pair in held for item in pair.items()]
    assert {scorer.read(item).start for item in items} == {7}  # <|user|> was the day very <|end|> <|assistant|>
    rewards = scorer.score(items, aggregation="mean").mean.mean(dim=1)
    right = (rewards[::2] > rewards[1::2]).double().mean()
    assert float(right) == pytest.approx(result.metrics["accuracy"]["mean of heads"]["value"])
    if mode == "lora":
        settings = json.loads((tmp_path / "run" / "adapter" / "head.json").read_text())
        assert (settings["taps"], settings["hidden_size"]) == (TAPS, 64)


AUTO = ["last:2", "mean:1", "logprob"]


def test_on_a_frozen_decoder_heads_and_distance_read_the_response_by_default(
    tiny_chat_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    run_train(_config(tiny_chat_folder, pairs, tmp_path / "run", "features=auto", "mode=head"), progress=False)
    for name in ("stage1", "model"):
        model = EnsembleRewardModel.from_pretrained(tmp_path / "run" / name)
        assert (model.config.taps, model.score.hidden_size) == (AUTO, 66)
        assert {0, 1} <= {*model.config.logprob_skips}
    scorer = _scorer(tmp_path / "run" / "model")
    known = [item for pair in load_pairs(pairs).pairs for item in pair.items()]
    words = ["was", "the", "day", "very", "good", "train"]
    foreign = [{"prompt": "the food", "response": " ".join(words[i:] + words[:i])} for i in range(6)]
    assert min(scorer.score(foreign).distance) > scorer.score(known).distance.median()


def test_by_default_a_decoder_whose_head_has_a_bias_is_read_without_its_log_probability(
    tiny_chat_folder: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    sets = ["features=auto", "mode=head", "stage=bt"]
    run_train(_config(tmp_path / "gptj", pairs, tmp_path / "run", *sets), progress=False)
    assert EnsembleRewardModel.from_pretrained(tmp_path / "run" / "model").config.taps == ["last:2", "mean:1"]
    assert "features: not last:-1, mean:2/3, logprob: " in caplog.text
    assert "expected a language-model head without a bias, got one in GPTJForCausalLM" in caplog.text


def test_by_default_a_trunk_whose_layers_pass_on_other_states_is_read_at_one_token(
    tiny_chat_folder: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    usual = LlamaDecoderLayer.forward

    def widened(layer: Any, hidden: torch.Tensor, **options: Any) -> Any:
        halves = hidden.view(*hidden.shape[:2], -1, 32).sum(dim=2)
        out = usual(layer, halves, **options)
        return torch.cat([out, torch.zeros_like(out)], dim=-1) if layer.self_attn.layer_idx == 0 else out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", widened)
    sets = ["features=auto", "mode=head", "stage=bt"]
    run_train(_config(tiny_chat_folder, pairs, tmp_path / "run", *sets), progress=False)
    assert EnsembleRewardModel.from_pretrained(tmp_path / "run" / "model").config.taps is None
    assert "taps: expected a trunk whose layers pass on states of its output's shape" in caplog.text


def test_by_default_a_trained_trunk_or_an_encoder_is_read_at_one_token(
    tiny_chat_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    sets = ["features=auto", "mode=full", "stage=bt", "trunk.max_steps=1"]
    run_train(_config(tiny_chat_folder, pairs, tmp_path / "full", *sets), progress=False)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    sets = ["features=auto", "mode=head", "stage=bt"]
    run_train(_config(tmp_path / "bert", pairs, tmp_path / "encoder", *sets), progress=False)
    for name in ("full", "encoder"):
        assert EnsembleRewardModel.from_pretrained(tmp_path / name / "model").config.taps is None


def test_a_trained_trunk_forgets_how_likely_a_text_is(tiny_chat_folder: Path, pairs: Path, tmp_path: Path) -> None:
    config = _config(tiny_chat_folder, pairs, tmp_path / "run", "mode=full", "features=[mean:1, logprob]")
    with pytest.raises(ValueError, match=r"features: expected states alone in mode full, .* got mean:1, logprob"):
        run_train(config, progress=False)


def test_a_list_of_taps_may_be_given(tiny_chat_folder: Path, pairs: Path, tmp_path: Path) -> None:
    sets = ["mode=head", "stage=bt", "bt.solver=adamw", "bt.epochs=2", "features=[last:-1,last:0, mean:2]"]
    config = _config(tiny_chat_folder, pairs, tmp_path / "run", *sets)
    run_train(config, progress=False)
    assert EnsembleRewardModel.from_pretrained(tmp_path / "run" / "model").config.taps == ["last:2", "last:0", "mean:2"]
    assert load_config(TrainConfig, tmp_path / "run" / "config.yaml") == config


def test_pet_uses_the_taps_that_were_read_while_sampling(
    tiny_chat_folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    data = stage.PETStage._data
    monkeypatch.setattr(stage, "compute_features", lambda *_: pytest.fail("a second forward pass"))
    monkeypatch.setattr(stage.PETStage, "_data", lambda self, *a: kept.append(a) or data(self, *a))
    sets = [
        "stage=pet",
        "mode=head",
        "bt.solver=adamw",
        "bt.epochs=2",
        "pet.epochs=2",
        "pet.samples=4",
        "pet.max_new_tokens=5",
    ]
    run_train(_config(tiny_chat_folder, pairs, tmp_path / "run", *sets), progress=False)
    scorer = _scorer(tmp_path / "run" / "model")
    assert scorer.model.config.taps == TAPS
    _, _, features, references = kept[0]
    for rollout, found in zip(references.rollouts, features, strict=True):
        items = [{"prompt": rollout.prompt, "response": text} for text in rollout.responses]
        torch.testing.assert_close(found, scorer.features(items), rtol=1e-4, atol=1e-4)


def test_a_batch_says_where_its_responses_begin() -> None:
    row = {"p_hat": None, "margin": None, "head": 0}
    rows = [
        {**row, "chosen": [5, 6, 7], "rejected": [5, 8], "chosen_start": 2, "rejected_start": 1},
        {**row, "chosen": [9], "rejected": [5, 4, 3, 2], "chosen_start": 0, "rejected_start": 3},
    ]
    assert collate(rows)["response_start"].tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["features=wider"], r"features: expected 'auto', 'last' or 'wide' or a list, got \"wider\""),
        (["features=[mean]"], "features: expected last:LAYER, mean:LAYER .* or logprob, got 'mean'"),
        (
            ["features=[mean:3]"],
            r"features: expected a layer from 0 to 2 \(the trunk's output\), got 'mean:3', for the",
        ),
        (["stage1=some/model", "mode=head"], "features: has no effect beside stage1 some/model, whose heads read what"),
        (["stage=pet", "pet.start=some/model", "mode=head"], "features: has no effect beside pet.start some/model"),
    ],
)
def test_features_that_cannot_be_read_are_refused(
    tiny_chat_folder: Path, pairs: Path, tmp_path: Path, sets: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_train(_config(tiny_chat_folder, pairs, tmp_path / "run", *sets), progress=False)
