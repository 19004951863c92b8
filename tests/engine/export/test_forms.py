"""What each form carries, what it refuses by name, and the parts of an export by themselves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from prudent.engine import EnsembleRewardModel, Scorer, fit_trust
from prudent.engine.export import FORMS, linear_weights, prepare
from prudent.engine.export.padding import PADDING, set_padding
from prudent.kernels import Aggregation, ensemble_reward

LINEAR = ["mean", "head:1", "nominal,nominal=mean", "tradeoff:1,nominal=head:2", "mean,trust=0", "mean,source=mean"]
PER_ROW = [
    "tradeoff:0.4", "tradeoff:0.3,nominal=relative_std", "tradeoff:0.4,nominal=mean", "nominal,nominal=head:2",
    "nominal", "mean", "min", "max", "median", "lcb:1", "uwo:0.5", "softmin:0.2", "cvar:0.5", "head:3", "trust:1",
    "lcb:1,trust=3,from=0.5,power=1", "min,trust=0.5,power=4",
]  # fmt: skip
OF_BATCH = ["batch_worst", "tradeoff:0.4,worst=batch", "mean,centre=batch", "mean,centre=group"]


@pytest.fixture
def reward(tiny_trunk: Any) -> EnsembleRewardModel:
    return EnsembleRewardModel.from_trunk(tiny_trunk(), num_heads=3).eval()


@pytest.mark.parametrize("heads", [4, 5])
@pytest.mark.parametrize("form", ["stock", "remote-code"])
@pytest.mark.parametrize("aggregation", PER_ROW)
@torch.no_grad()
def test_the_files_beside_the_weights_combine_the_heads_as_the_op_does(
    tiny_trunk: Any, make_tokenizer: Any, tmp_path: Path, aggregation: str, form: str, heads: int
) -> None:
    torch.manual_seed(2)
    reward = EnsembleRewardModel.from_trunk(tiny_trunk(), num_heads=heads, aggregation="mean").eval()
    head, features = reward.score, torch.randn(40, 32)
    head.weight.normal_(std=0.3)
    head.shift.normal_()
    for tensor in (head.scale, head.std_ref):
        tensor.uniform_(0.5, 2)
    head.set_trust(fit_trust(features, directions=3))
    head.aggregation = aggregation
    wanted = head(features)
    if form == "remote-code":
        found = remote_heads(reward)(features)
        combined = remote_heads(reward).aggregate(*found, aggregation)
        torch.testing.assert_close(combined, wanted.reward, rtol=1e-5, atol=1e-5)
        return
    prepared = prepare(reward, make_tokenizer(), "stock")
    for name, content in prepared.files.items():
        (tmp_path / name).write_bytes(content)
    finished = client(tmp_path).finish(tmp_path, prepared.model.score(features).numpy(), features.numpy())
    torch.testing.assert_close(torch.from_numpy(finished["reward"]).float(), wanted.reward, rtol=1e-5, atol=1e-5)
    assert finished["distance"] == pytest.approx(wanted.distance.numpy(), abs=1e-4)


def remote_heads(reward: EnsembleRewardModel) -> Any:
    from prudent.engine.export import modeling_prudent as remote

    config = remote.EnsembleRewardConfig(num_heads=reward.score.num_heads, trust_directions=3)
    config.std_floor = reward.score.std_floor
    heads = remote.Heads(32, config)
    heads.load_state_dict(reward.score.state_dict())
    return heads


def client(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("client", folder / "prudent_client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("aggregation", LINEAR)
def test_a_linear_aggregation_is_a_weighted_sum_of_the_means(aggregation: str) -> None:
    weights = linear_weights(Aggregation.parse(aggregation), 3)
    features, matrix = torch.randn(9, 8), torch.randn(6, 8)
    out = ensemble_reward(features, matrix, aggregation=aggregation.removesuffix(",trust=0"))
    torch.testing.assert_close(out.mean @ torch.tensor(weights), out.reward)


@pytest.mark.parametrize("aggregation", sorted({*PER_ROW, *OF_BATCH} - {"mean", "head:3", "nominal,nominal=head:2"}))
def test_other_aggregations_are_not_linear_except_of_one_head(aggregation: str) -> None:
    spec = Aggregation.parse(aggregation)
    if "centre" not in aggregation:
        assert linear_weights(spec, 4) is None
    priced_or_of_batch = bool(spec.trust) or spec.of_batch
    assert linear_weights(spec, 1) == (None if priced_or_of_batch else [1.0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aggregation", OF_BATCH)
def test_no_form_takes_rewards_that_depend_on_the_batch(
    reward: EnsembleRewardModel, make_tokenizer: Any, form: Any, aggregation: str
) -> None:
    with pytest.raises(ValueError, match="scores each response by itself") as error:
        prepare(reward, make_tokenizer(), form, aggregation)
    assert aggregation in str(error.value)
    assert str(reward.score.aggregation) == "tradeoff:0.4"


def test_one_label_carries_no_minimum(reward: EnsembleRewardModel, make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"^aggregation: expected one that is a weighted sum .* got 'tradeoff:0.4'"):
        prepare(reward, make_tokenizer(), "linear")
    prepare(reward, make_tokenizer(), "linear", "head:2")


@pytest.mark.parametrize("form", ["stock", "linear"])
@pytest.mark.parametrize("taps", ["wide", ["mean:1"], ["last:-1", "mean:1", "logprob"]])
def test_a_stock_classifier_reads_no_taps(causal_lm: Any, make_tokenizer: Any, form: Any, taps: Any) -> None:
    reward = EnsembleRewardModel.from_trunk(causal_lm, num_heads=3, aggregation="mean", taps=taps)
    with pytest.raises(ValueError, match=r"^as: expected remote-code, because the heads read .*mean:1.*features=last"):
        prepare(reward, make_tokenizer(), form)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "modernbert"])
@pytest.mark.parametrize("form", ["stock", "linear"])
def test_an_encoders_classifier_puts_layers_between(
    tiny_trunk: Any, make_tokenizer: Any, family: str, form: Any
) -> None:
    reward = EnsembleRewardModel.from_trunk(tiny_trunk(family), aggregation="mean")
    with pytest.raises(
        ValueError, match=rf"^as: expected remote-code, because the heads read the first .*, got {form}$"
    ):
        prepare(reward, make_tokenizer(), form)


def test_a_pooler_that_the_family_puts_elsewhere_is_refused(tiny_trunk: Any, make_tokenizer: Any) -> None:
    reward = EnsembleRewardModel.from_trunk(tiny_trunk("roberta"), aggregation="mean", pooling="pooler")
    with pytest.raises(ValueError, match="RobertaForSequenceClassification is not one linear layer"):
        prepare(reward, make_tokenizer(), "stock")


def test_a_trunk_that_reads_its_batch_is_refused(tiny_trunk: Any, make_tokenizer: Any) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    trunk = tiny_trunk("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match="rotary frequencies change with the longest text of a batch beyond 128"):
        prepare(EnsembleRewardModel.from_trunk(trunk), make_tokenizer(), "stock")
    prepare(EnsembleRewardModel.from_trunk(trunk, max_score_length=128), make_tokenizer(), "stock")


def test_a_family_without_a_classifier_is_refused(tiny_trunk: Any, make_tokenizer: Any) -> None:
    reward = EnsembleRewardModel.from_trunk(tiny_trunk("cohere"), aggregation="mean")
    with pytest.raises(ValueError, match=r"^model: expected a family with a sequence classifier .* got 'cohere'"):
        prepare(reward, make_tokenizer(), "linear")
    prepare(reward, make_tokenizer(), "remote-code")


def test_a_trunk_with_code_of_its_own_is_refused(reward: EnsembleRewardModel, make_tokenizer: Any) -> None:
    class Mine(type(reward.model)):  # type: ignore[misc]
        pass

    reward.model.__class__ = Mine
    with pytest.raises(ValueError, match="expected a trunk of transformers, got Mine"):
        prepare(reward, make_tokenizer(), "stock")


@pytest.mark.parametrize("form", FORMS)
def test_an_export_changes_neither_the_model_nor_its_tokeniser(
    reward: EnsembleRewardModel, make_tokenizer: Any, tmp_path: Path, form: Any
) -> None:
    tokenizer = make_tokenizer(pad_token="</s>")
    reward.score.aggregation = "mean"
    before = {name: tensor.clone() for name, tensor in reward.state_dict().items()}
    config = json.loads(reward.config.to_json_string())
    prepare(reward, tokenizer, form).write(tmp_path)
    after = reward.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    changed = json.loads(reward.config.to_json_string())
    assert {key: changed[key] for key in config if key not in ("aggregation", "architectures", "dtype")} == {
        key: value for key, value in config.items() if key not in ("aggregation", "architectures", "dtype")
    }
    assert (tokenizer.pad_token, len(tokenizer)) == ("</s>", 260)


def test_texts_that_end_with_the_padding_token_would_be_read_elsewhere(
    reward: EnsembleRewardModel, make_tokenizer: Any
) -> None:
    """Why the tokeniser gets a padding token of its own: the stock head skips the EOS token that closes a text."""
    reward.score.aggregation = "mean"
    prepared = prepare(reward, make_tokenizer(pad_token="</s>"), "linear")
    scorer = Scorer(reward, make_tokenizer(pad_token="</s>"), progress=False)
    ids = torch.tensor([scorer.encode("text")])
    assert prepared.padded
    assert int(ids[0, -1]) == 2
    with torch.no_grad():
        mine = float(prepared.model(ids).logits) + prepared.constant
        prepared.model.config.pad_token_id = 2
        theirs = float(prepared.model(ids).logits) + prepared.constant
    assert mine == pytest.approx(scorer.score(["text"]).reward[0], abs=1e-6)
    assert abs(mine - theirs) > 1e-4


@pytest.mark.parametrize(
    ("special", "skipped", "wanted"),
    [
        ({}, None, ("<pad>", False)),
        ({"pad_token": ""}, None, (PADDING, True)),
        ({"pad_token": "</s>"}, None, (PADDING, True)),
        ({"unk_token": "<pad>"}, None, (PADDING, True)),
        ({"pad_token": "<|end|>", "chat": True}, None, (PADDING, True)),
        ({}, 2, ("</s>", True)),
        ({"pad_token": "</s>"}, 2, ("</s>", False)),
    ],
)
def test_the_padding_token_is_one_that_ends_no_text(
    make_tokenizer: Any, special: dict[str, Any], skipped: int | None, wanted: tuple[str, bool]
) -> None:
    tokenizer = make_tokenizer(**special)
    number, changed = set_padding(tokenizer, skipped)
    assert (tokenizer.pad_token, changed) == wanted
    assert tokenizer.pad_token_id == number
    assert tokenizer("a")["input_ids"][-1] != number


def test_a_client_that_lacks_the_features_says_so(
    reward: EnsembleRewardModel, make_tokenizer: Any, tmp_path: Path
) -> None:
    reward.score.set_trust(fit_trust(torch.randn(40, 32)))
    for name, content in prepare(reward, make_tokenizer(), "stock", "trust:1").files.items():
        (tmp_path / name).write_bytes(content)
    finish = client(tmp_path).finish
    logits = np.zeros((2, 6))
    with pytest.raises(
        ValueError, match=r"^features: expected the last hidden states \[B, D\], because the reward pric"
    ):
        finish(tmp_path, logits)
    assert finish(tmp_path, logits, aggregation="mean")["distance"] is None
    with pytest.raises(ValueError, match="scores each row by itself, got 'batch_worst'"):
        finish(tmp_path, logits, aggregation="batch_worst")
    assert len((tmp_path / "prudent_client.py").read_text().splitlines()) < 100


def test_prudent_reads_its_own_linear_export_with_the_constant(
    reward: EnsembleRewardModel, make_tokenizer: Any, tmp_path: Path
) -> None:
    reward.config.append_eos, reward.config.max_score_length = False, 20
    reward.score.shift.fill_(3.0)
    wanted = Scorer(reward, make_tokenizer(), progress=False).score(["a text", "another"], aggregation="mean").reward
    prepared = prepare(reward, make_tokenizer(), "linear", "mean")
    prepared.write(tmp_path)
    again = EnsembleRewardModel.from_sequence_classifier(tmp_path)
    assert (again.config.append_eos, again.config.max_score_length) == (False, 20)
    assert prepared.constant < -2
    assert Scorer(again, make_tokenizer(), progress=False).score(["a text", "another"]).reward == pytest.approx(wanted)


def test_prudent_reads_its_own_remote_code_export_without_running_it(
    reward: EnsembleRewardModel, make_tokenizer: Any, tmp_path: Path
) -> None:
    prepare(reward, make_tokenizer(), "remote-code").write(tmp_path)
    (tmp_path / "modeling_prudent.py").write_text("raise RuntimeError")
    again = EnsembleRewardModel.from_pretrained(tmp_path)
    assert again.score.weight.equal(reward.score.weight)


def test_a_tokeniser_without_padding_gets_some(
    reward: EnsembleRewardModel, make_tokenizer: Any, tmp_path: Path
) -> None:
    prepared = prepare(reward, make_tokenizer(pad_token="", eos_token="</s>"), "remote-code")
    assert (prepared.tokenizer.pad_token, prepared.padded) == ("</s>", False)
    assert prepare(reward, make_tokenizer(pad_token="", eos_token=""), "remote-code").tokenizer.pad_token == "<pad>"
