"""EnsembleRewardModel: every family of trunk, padding, saving, and what trainers need."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from prudent.engine import EnsembleHead, EnsembleRewardConfig, EnsembleRewardModel

DECODERS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt_neox", "gpt2"]
ENCODERS = ["bert", "roberta", "modernbert"]
FAMILIES = [*DECODERS, *ENCODERS]


@pytest.fixture
def make_model(tiny_trunk):
    def build(family="llama", **options):
        torch.manual_seed(1)
        return EnsembleRewardModel.from_trunk(tiny_trunk(family), **{"num_heads": 3, **options})

    return build


def tokens(batch=2, length=10, seed=0):
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, before, after, with_id=7):
    """The same sequences between padding tokens that look like any other token."""
    ids = torch.nn.functional.pad(ids, (before, after), value=with_id)
    mask = torch.zeros_like(ids)
    mask[:, before : ids.shape[1] - after] = 1
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_and_right_padding_and_none_give_the_same_score(make_model, family):
    model, ids = make_model(family), tokens()
    plain = model(ids)
    for before, after in ((0, 5), (5, 0), (2, 3)):
        out = model(*padded(ids, before, after))
        torch.testing.assert_close(out.mean, plain.mean, rtol=0, atol=2e-6)
        torch.testing.assert_close(out.std, plain.std, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sequences_of_different_lengths_score_as_they_do_alone(make_model, family):
    model, ids = make_model(family), tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    mask[1, :5] = 0
    together = model(ids, mask).mean
    alone = [model(ids[:1, :9]), model(ids[1:2, 5:]), model(ids[2:])]
    torch.testing.assert_close(together, torch.cat([out.mean for out in alone]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_head_on_the_features_is_the_forward(make_model, family):
    model = make_model(family)
    ids, mask = padded(tokens(), 1, 2)
    features, out = model.features(ids, mask), model(ids, mask)
    scored = model.score(features)
    assert features.shape == (2, 32)
    torch.testing.assert_close(scored.mean, out.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(scored.reward[:, None], out.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_the_trunks_last_or_first_attended_hidden_state(make_model, family):
    model, ids = make_model(family), tokens()
    hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    place = 0 if family in ENCODERS else -1
    torch.testing.assert_close(model.features(ids), hidden[:, place], rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saving_and_loading_keeps_every_bit(make_model, family, dtype, tmp_path):
    model = make_model(family, aggregation="lcb:0.5", std_floor=0.01, append_eos=False)
    model.model.to(dtype)
    model.score.shift.fill_(1 / 3)
    model.score.scale.fill_(0.7)
    model.score.std_ref.fill_(1.3)
    model.save_pretrained(tmp_path)
    loaded = EnsembleRewardModel.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name
    assert loaded.score.weight.dtype == torch.float32
    assert loaded.model.dtype == dtype
    assert str(loaded.score.aggregation) == loaded.config.aggregation == "lcb:0.5"
    assert loaded.score.std_floor == 0.01
    assert loaded.config.append_eos is False
    assert loaded.config.pooling == model.config.pooling
    assert not loaded.training
    if dtype == torch.float32:
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-7)


def test_the_aggregation_that_the_head_has_when_saved_is_the_one_loaded(make_model, tmp_path):
    model = make_model()
    model.score.aggregation = "uwo:0.25"
    model.save_pretrained(tmp_path)
    assert str(EnsembleRewardModel.from_pretrained(tmp_path).score.aggregation) == "uwo:0.25"


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModel])
def test_auto_classes_load_it_by_path(make_model, tmp_path, auto):
    make_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is EnsembleRewardConfig
    assert type(config.text_config).__name__ == "LlamaConfig"
    assert type(auto.from_pretrained(tmp_path, num_labels=1)) is EnsembleRewardModel


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_asked_for_reaches_the_trunk(make_model, tmp_path, attention):
    make_model().save_pretrained(tmp_path)
    for auto in (EnsembleRewardModel, AutoModelForSequenceClassification):
        model = auto.from_pretrained(tmp_path, attn_implementation=attention)
        assert model.model.config._attn_implementation == attention
        model.set_attn_implementation("eager")
        assert model.model.config._attn_implementation == "eager"


def test_loading_in_another_dtype_casts_the_trunk_alone(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    model = EnsembleRewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.model.dtype == torch.bfloat16
    assert {value.dtype for value in model.score.state_dict().values()} == {torch.float32}
    model.half()
    assert model.model.dtype == torch.float16
    assert model(tokens()).logits.dtype == torch.float32


def test_a_checkpoint_without_its_heads_is_refused(make_model, tmp_path):
    model = make_model()
    state = {name: value for name, value in model.state_dict().items() if name != "score.scale"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"expected every tensor .* in the checkpoint, got none for score\.scale"):
        EnsembleRewardModel.from_pretrained(tmp_path)


def test_loading_info_is_returned_when_asked_for(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    model, info = EnsembleRewardModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is EnsembleRewardModel
    assert not info["missing_keys"]


def test_a_model_from_its_config_alone_has_a_properly_drawn_head(tiny_config):
    torch.manual_seed(0)
    model = EnsembleRewardModel(EnsembleRewardConfig(text_config=tiny_config("llama"), num_heads=4, aggregation="min"))
    assert model.score.weight[:4].std().item() == pytest.approx(1 / 33**0.5, rel=0.3)
    assert model.score.scale.tolist() == [1.0] * 4
    assert str(model.score.aggregation) == "min"
    assert model.training


def test_output_has_one_logit_a_row_and_k_means_and_stds(make_model):
    out = make_model()(tokens())
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "logits": (2, 1),
        "mean": (2, 3),
        "std": (2, 3),
    }
    assert out.loss is None
    assert (out.std > 0).all()


def test_return_dict_false_gives_a_tuple(make_model):
    logits, mean, std = make_model()(tokens(), return_dict=False)
    assert logits.shape == (2, 1)
    assert mean.shape == std.shape == (2, 3)


def test_whatever_else_trainers_pass_is_ignored(make_model):
    model, ids = make_model("gpt2").eval(), tokens()
    extra = {"use_cache": True, "token_type_ids": torch.ones_like(ids), "labels": torch.zeros(2)}
    assert torch.equal(model(ids, **extra).logits, model(ids).logits)


def test_the_padding_id_of_the_config_plays_no_part(make_model):
    """A sequence that holds the padding id as a real token is read to its attended end."""
    model, ids = make_model(), tokens()
    ids[:, -3:] = 5
    model.config.get_text_config().pad_token_id = 5
    alone = model(ids).logits
    assert not torch.allclose(alone, model(ids[:, :-3]).logits)
    torch.testing.assert_close(model(*padded(ids, 3, 3, with_id=5)).logits, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_kind_of_number_will_do(make_model, kind):
    model = make_model()
    ids, mask = padded(tokens(), 2, 2)
    torch.testing.assert_close(model(ids, mask.to(kind)).logits, model(ids, mask).logits, rtol=0, atol=1e-6)


def test_explicit_positions_are_used(make_model):
    model, ids = make_model("gpt2"), tokens()
    shifted = torch.arange(5, 15).expand(2, -1)
    assert not torch.allclose(model(ids, position_ids=shifted).logits, model(ids).logits)


def test_autocast_around_the_model_leaves_the_head_in_fp32(make_model):
    model, ids = make_model().eval(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, features = model(ids), model.features(ids)
    torch.testing.assert_close(out.mean, model.score(features).mean, rtol=0, atol=1e-6)
    assert out.logits.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, family):
    model = make_model(family)
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    for each in (model, plain):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each(tokens()).logits.sum().backward()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_lora_trains_adapters_and_heads_and_survives_saving(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_model()
    fresh = copy.deepcopy(base)
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"], r=4)
    model = peft.get_peft_model(base, lora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any("score" in name for name in trained)
    assert not any("original_module" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model(input_ids=tokens()).logits.detach()
    for _ in range(2):  # lora_A moves once lora_B has left zero
        optimizer.zero_grad()
        model(input_ids=tokens()).logits.sum().backward()
        optimizer.step()
    after = model(input_ids=tokens())
    assert (after.logits < before).all()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(loaded(input_ids=tokens()).mean, after.mean)


def test_input_embeddings_are_the_trunks(make_model):
    model = make_model()
    assert model.get_input_embeddings() is model.model.embed_tokens
    model.resize_token_embeddings(310)
    assert model.get_input_embeddings().num_embeddings == 310


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (tokens(2, 4), torch.ones(2, 5), r"attention_mask: expected input_ids' shape \[2, 4\], got \[2, 5\]"),
        (tokens(2, 4), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]), "expected a token in every row, got none in row 1"),
        (tokens(2, 4)[0], None, r"input_ids: expected \[B, T\] with T above 0, got \[4\]"),
        (tokens(2, 0), None, r"input_ids: expected \[B, T\] with T above 0, got \[2, 0\]"),
    ],
)
def test_inputs_that_cannot_be_scored_are_refused(make_model, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        make_model()(ids, mask)


def test_a_sequence_beyond_the_trunks_positions_is_warned_of(make_model, recwarn):
    model = make_model()
    model(tokens(1, 128))
    assert not [w for w in recwarn if "positions" in str(w.message)]
    with pytest.warns(UserWarning, match="longer than the trunk's 128 positions"):
        model(tokens(1, 129))


def test_a_model_without_a_trunk_is_refused():
    with pytest.raises(ValueError, match=r"text_config: expected the trunk's configuration, got None"):
        EnsembleRewardModel(EnsembleRewardConfig())


def test_a_given_head_is_used_as_it_is(tiny_trunk):
    head = EnsembleHead(32, 2, aggregation="median")
    weight = head.weight.clone()
    model = EnsembleRewardModel.from_trunk(tiny_trunk(), head=head)
    assert model.score is head
    assert torch.equal(head.weight, weight)
    assert (model.config.num_heads, model.config.aggregation) == (2, "median")
