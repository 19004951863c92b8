"""Find the kind of a reward source; what rewards of models read and return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prudent.engine import EnsembleHead, EnsembleRewardModel, Scorer, fit_trust
from prudent.kernels import philox_normal
from prudent.rlhf.models.adapter import save_head
from prudent.rlhf.ppo.batch import Samples
from prudent.rlhf.ppo.config import RewardConfig, kind_by_name
from prudent.rlhf.ppo.rewards.open import open_source
from prudent.rlhf.ppo.rewards.resolve import open_encoder, resolve_reward
from prudent.rlhf.ppo.rewards.sources import Texts
from prudent.rlhf.sampling.prompts import Prompt


def _save(folder: Path, policy: Any, tokenizer: Any, heads: int = 3, **options: Any) -> Path:
    torch.manual_seed(4)
    EnsembleRewardModel.from_trunk(policy, num_heads=heads, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _open_model(source: str | Path, tokenizer: Any, prompts: list[Prompt], **reward: Any) -> Any:
    """The source of a reward of kind model, which is not compared with any policy."""
    config = RewardConfig(source=str(source), kind="model", **reward)
    return open_source(config, resolve_reward(config, None, "cpu"), Texts(tokenizer, prompts))


def resolve_kind(config: RewardConfig, policy: Any) -> str:
    return resolve_reward(config, policy, "cpu").kind


def load_shared_head(source: str | Path, policy: Any, aggregation: str = "") -> EnsembleHead:
    config = RewardConfig(source=str(source), kind="shared", aggregation=aggregation)
    found = resolve_reward(config, policy, "cpu").on_trunk
    assert found is not None
    return found.head


@pytest.mark.parametrize(
    ("asked", "trained", "found"),
    [("auto", False, "shared"), ("shared", False, "shared"), ("auto", True, "model"), ("model", False, "model")],
)
def test_a_reward_model_and_its_tokeniser_are_read_once(
    policy: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: Any,
    trained: bool,
    found: str,
) -> None:
    trunk = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path)
    if trained:
        with torch.no_grad():
            trunk.model.layers[1].self_attn.q_proj.weight += 1e-3
    config = RewardConfig(source=str(_save(tmp_path, trunk, tokenizer)), kind=asked, aggregation="min")
    loads: list[Any] = []
    for kind in (EnsembleRewardModel, AutoTokenizer):
        load = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, _k=kind, _l=load, **o: loads.append(_k) or _l(*a, **o))
    resolved = resolve_reward(config, policy, "cpu")
    source = open_source(config, resolved, Texts(tokenizer, prompts))
    assert (resolved.kind, resolved.num_heads) == (found, 3)
    assert (source is None) == (found == "shared")
    if source is None:
        open_encoder(config.source, policy)
    assert loads == [EnsembleRewardModel, AutoTokenizer]


# -- distance


def _with_region(folder: Path) -> Path:
    model = EnsembleRewardModel.from_pretrained(folder)
    model.score.set_trust(fit_trust(torch.randn(40, model.config.hidden_size)))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("heads", [1, 3])
def test_a_price_needs_a_trust_region_and_one_head_takes_it_alone(
    policy: Any, tokenizer: Any, tmp_path: Path, heads: int
) -> None:
    folder = _save(tmp_path, policy, tokenizer, heads=heads)
    with pytest.raises(ValueError, match=r"^reward.aggregation: expected a model with a trust region .* calibrate"):
        load_shared_head(folder, policy, "lcb:1,trust=2")
    head = load_shared_head(_with_region(folder), policy, "lcb:1,trust=2")
    assert str(head.aggregation) == ("trust:2,source=mean" if heads == 1 else "lcb:1,trust=2")


def test_one_head_keeps_the_price_that_the_model_was_saved_with(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = _with_region(_save(tmp_path, policy, tokenizer, heads=1))
    model = EnsembleRewardModel.from_pretrained(folder)
    model.score.aggregation = "trust:1"
    model.save_pretrained(folder)
    for asked, priced in (("tradeoff:0.4", 1.0), ("", 1.0), ("mean,trust=0", 0.0)):
        assert load_shared_head(folder, policy, asked).aggregation.trust == priced


def test_models_with_a_region_give_distances_and_functions_do_not(
    policy: Any, tokenizer: Any, prompts: list[Prompt], tmp_path: Path
) -> None:
    folder = _save(tmp_path, policy, tokenizer)
    samples = Samples([prompts[0].ids], [[5, 6]], [False], [0])
    config = RewardConfig(source=str(folder), kind="model")
    assert not resolve_reward(config, None, "cpu").measures_distance
    assert not resolve_reward(RewardConfig(source="vader"), policy, "cpu").measures_distance
    assert _open_model(folder, tokenizer, prompts)(samples).distance is None
    _with_region(folder)
    assert resolve_reward(config, None, "cpu").measures_distance
    assert _open_model(folder, tokenizer, prompts)(samples).distance.shape == (1,)


# -- kinds


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("https://host:80/score", "http"),
        ("my.rewards:score", "callable"),
        ("folder/my.py:score", "callable"),
        ("vader", "callable"),
    ],
)
def test_the_kind_follows_from_the_name(source: str, kind: str, policy: Any) -> None:
    assert resolve_kind(RewardConfig(source=source), policy) == kind
    assert kind_by_name(RewardConfig(source=source, kind="model")) == "model"


def test_a_source_that_is_nothing_is_refused(policy: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"reward.source: expected a reward model's folder or hub name, .* got 'no/such'"
    ):
        resolve_kind(RewardConfig(source="no/such"), policy)
    with pytest.raises(ValueError, match=r"reward.source: expected a reward model's folder"):
        resolve_kind(RewardConfig(source=str(tmp_path)), policy)


def test_a_mistyped_folder_is_refused_before_a_hub_is_asked(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^reward\.source: runs/lora: no such file or folder"):
        resolve_kind(RewardConfig(source="runs/lora"), policy)


def test_weights_cut_short_are_one_sentence_with_their_folder(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    weights = _save(tmp_path, policy, tokenizer) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    for load in (
        lambda: resolve_kind(RewardConfig(source=str(tmp_path)), policy),
        lambda: load_shared_head(tmp_path, policy),
    ):
        with pytest.raises(ValueError, match=rf"^reward\.source: {tmp_path}: its weights cannot be read"):
            load()


def test_a_model_without_a_tokeniser_is_one_sentence_with_its_folder(
    policy: Any, prompts: list[Prompt], tokenizer: Any, tmp_path: Path
) -> None:
    EnsembleRewardModel.from_trunk(policy, num_heads=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^reward\.source: .*{tmp_path}.*") as error:
        _open_model(tmp_path, tokenizer, prompts)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_heads_on_the_policys_trunk_are_shared_in_any_precision(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    source = _save(tmp_path, policy, tokenizer)
    assert resolve_kind(RewardConfig(source=str(source)), policy) == "shared"
    half = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path, dtype=torch.bfloat16)
    assert resolve_kind(RewardConfig(source=str(source)), half) == "shared"


def test_a_trunk_that_was_trained_is_a_model_of_its_own(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight += 1e-3
    source = _save(tmp_path, other, tokenizer)
    assert resolve_kind(RewardConfig(source=str(source)), policy) == "model"
    with pytest.raises(
        ValueError, match=r"policy's own trunk .* layers.1.self_attn.q_proj.weight .* reward.kind=model"
    ):
        load_shared_head(source, policy)


def test_a_reward_that_is_not_read_at_the_last_token_is_a_model_of_its_own(
    policy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    source = _save(tmp_path, policy, tokenizer, pooling="first")
    assert resolve_kind(RewardConfig(source=str(source)), policy) == "model"
    with pytest.raises(ValueError, match="whose pooling is first, not last"):
        load_shared_head(source, policy)


def test_heads_that_skip_a_token_at_the_end_read_the_policys_trunk_in_front_of_it(
    policy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    item = {"prompt": "my day", "response": " good food"}
    last = Scorer(EnsembleRewardModel.from_trunk(policy), tokenizer, progress=False).encode(item)[-1]
    source = _save(tmp_path, policy, tokenizer, skip_token_id=last)
    scorer = Scorer(EnsembleRewardModel.from_pretrained(source), tokenizer, progress=False)
    assert resolve_kind(RewardConfig(source=str(source)), policy) == "shared"
    assert open_encoder(source, policy).encode(item) == scorer.encode(item)[:-1]


def test_append_eos_is_for_a_model_of_its_own_alone(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    source = _save(tmp_path, policy, tokenizer)
    with pytest.raises(
        ValueError, match=r"append_eos: expected null with kind shared \(only kind model reads it\), got True"
    ):
        resolve_kind(RewardConfig(source=str(source), append_eos=True), policy)
    with pytest.raises(ValueError, match="expected null with kind callable"):
        resolve_kind(RewardConfig(source="vader", append_eos=False), policy)


def test_a_sequence_classifier_is_a_model(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    _save_classifier(tmp_path, policy, tokenizer)
    assert resolve_kind(RewardConfig(source=str(tmp_path)), policy) == "model"
    with pytest.raises(ValueError, match="which is not an EnsembleRewardModel"):
        load_shared_head(tmp_path, policy)


def _save_classifier(folder: Path, policy: Any, tokenizer: Any) -> Any:
    from transformers import LlamaForSequenceClassification

    given = {k: v for k, v in policy.config.to_dict().items() if k not in ("id2label", "label2id")}
    config = policy.config.__class__(**{**given, "num_labels": 1, "pad_token_id": 0})
    torch.manual_seed(6)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- heads on the trunk


@pytest.mark.parametrize(
    ("heads", "aggregation", "expected"),
    [(3, "min", "min"), (3, "", "lcb:1"), (1, "tradeoff:0.4", "mean,source=mean"), (3, "mean,centre=batch", "mean")],
)
def test_the_runs_aggregation_is_what_the_heads_get(
    policy: Any, tokenizer: Any, tmp_path: Path, heads: int, aggregation: str, expected: str
) -> None:
    own = "lcb:1" if heads > 1 else "mean"
    head = load_shared_head(_save(tmp_path, policy, tokenizer, heads, aggregation=own), policy, aggregation)
    assert (head.num_heads, str(head.aggregation), head.training) == (heads, expected, False)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_an_aggregation_of_a_head_that_is_not_there_is_refused(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    source = _save(tmp_path, policy, tokenizer)
    with pytest.raises(ValueError, match=r"^reward\.aggregation 'head:7': expected a head below 3"):
        load_shared_head(source, policy, "head:7")
    with pytest.raises(ValueError, match=r"^reward\.aggregation 'head:7': expected a head below 3"):
        _open_model(source, tokenizer, [], aggregation="head:7")


@torch.no_grad()
def test_taps_come_with_the_heads_of_either_kind(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    source, folder = _save(tmp_path / "model", policy, tokenizer, taps="wide"), tmp_path / "adapter"
    folder.mkdir()
    save_head(EnsembleHead(64, 2), folder, taps=["last:2", "mean:1"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    tokenizer.save_pretrained(folder)
    for place in (source, folder):
        found = resolve_reward(RewardConfig(source=str(place)), policy, "cpu").on_trunk
        assert found is not None
        assert (found.taps, found.head.hidden_size) == (["last:2", "mean:1"], 64)
        read = open_encoder(place, policy).read({"prompt": "my day", "response": "good food"})
        assert read.start == len(tokenizer("<|user|> my day <|end|> <|assistant|>")["input_ids"])
    plain = _save(tmp_path / "plain", policy, tokenizer)
    assert open_encoder(plain, policy).read({"prompt": "my day", "response": "good food"}).start == 0


def test_the_model_is_found_in_the_run_that_trained_it(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    source = _save(tmp_path / "run" / "model", policy, tokenizer)
    run = source.parent
    assert resolve_kind(RewardConfig(source=str(run)), policy) == "shared"
    assert load_shared_head(run, policy).num_heads == load_shared_head(source, policy).num_heads
    open_encoder(run, policy)
    assert _open_model(run, tokenizer, []).num_heads == load_shared_head(source, policy).num_heads


def test_an_adapter_is_found_in_its_folder_and_in_its_run(policy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    save_head(EnsembleHead(32, 2), folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    for source in (folder, folder.parent):
        found = resolve_reward(RewardConfig(source=str(source), aggregation="min"), policy, "cpu").on_trunk
        assert found is not None
        assert found.adapter == folder
        assert (found.head.num_heads, str(found.head.aggregation)) == (2, "min")
    with pytest.raises(ValueError, match="expected a folder with a LoRA and heads"):
        resolve_reward(RewardConfig(source=str(tmp_path), kind="adapter"), policy, "cpu")
    (folder / "head.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"^reward\.source: .*head.safetensors"):
        resolve_reward(RewardConfig(source=str(folder)), policy, "cpu")


def test_a_reward_on_the_trunk_reads_by_the_tokeniser_the_eos_rule_and_the_length_that_it_was_saved_with(
    policy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    for name, theirs, options in (
        ("same", tokenizer, {}),
        ("no_template", plain, {}),
        ("no_eos", plain, {"append_eos": False}),
        ("short", tokenizer, {"max_score_length": 3}),
    ):
        source = _save(tmp_path / name, policy, theirs, **options)
        scorer = Scorer(EnsembleRewardModel.from_pretrained(source), theirs, progress=False)
        item = {"prompt": "my day", "response": " good food"}
        assert open_encoder(source, policy).encode(item) == scorer.encode(item)


# -- a model of its own


def test_a_model_reads_texts_with_its_own_tokeniser_and_template(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path, make_bytes: Callable[..., Any]
) -> None:
    theirs = make_bytes()
    source = _save(tmp_path, _byte_trunk(), theirs)
    rewards = _open_model(source, tokenizer, prompts, aggregation="min")(samples)
    items = [
        {"prompt": "my day", "response": "good food"},
        {"prompt": "my day", "response": "bad hotel"},  # cut off, and read as an ended one
        {"prompt": "the food was", "response": ""},
    ]
    scores = Scorer(EnsembleRewardModel.from_pretrained(source), theirs, progress=False).score(items, aggregation="min")
    assert rewards.reward.tolist() == pytest.approx(scores.reward)
    assert rewards.nominal.tolist() == pytest.approx(scores.nominal)
    torch.testing.assert_close(rewards.mean, scores.mean)
    torch.testing.assert_close(rewards.reward, scores.mean.amin(dim=1))
    sampled = _open_model(source, tokenizer, prompts, aggregation="min")(samples, 5)
    noise = philox_normal(torch.tensor([5]), len(items), 3)
    torch.testing.assert_close(sampled.reward, (scores.mean + scores.std * noise).amin(dim=1))
    torch.testing.assert_close(sampled.worst, scores.mean.amin(dim=1))


def test_a_sequence_classifier_has_one_head_whose_mean_is_the_reward(
    policy: Any, tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path
) -> None:
    _save_classifier(tmp_path, policy, tokenizer)
    source = _open_model(tmp_path, tokenizer, prompts)
    rewards = source(samples)
    assert (source.num_heads, rewards.nominal, rewards.worst) == (1, None, None)
    torch.testing.assert_close(rewards.reward, rewards.mean[:, 0])
    assert _open_model(tmp_path, tokenizer, prompts, append_eos=False)._scorer.model.config.append_eos is False


def test_a_reward_that_is_not_finite_is_nan_and_spoils_no_other(
    policy: Any, tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path
) -> None:
    source = _open_model(_save(tmp_path, policy, tokenizer), tokenizer, prompts)
    clean = source(samples).reward
    with torch.no_grad():
        source._scorer.model.get_input_embeddings().weight[tokenizer("hotel")["input_ids"][0]] = float("inf")
    assert torch.equal(source(samples).reward.isnan(), torch.tensor([False, True, False]))
    torch.testing.assert_close(source(samples).reward[[0, 2]], clean[[0, 2]])


def _byte_trunk() -> Any:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(8)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=300, initializer_range=0.3, **sizes)).eval()


@pytest.fixture(scope="module")
def make_bytes() -> Callable[..., Any]:
    """A tokeniser of single bytes, without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build() -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bytewise = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["</s>", *alphabet])}, merges=[]))
        bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bytewise.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>")

    return build
