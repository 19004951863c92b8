"""from_trunk and from_sequence_classifier: what they share, what they keep exactly, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import pad

from prudent.engine import EnsembleHead, EnsembleRewardModel

DECODERS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt_neox", "gpt2"]
CLASSIFIERS = [*DECODERS, "bert"]


def side_padded(row, length, left, value):
    """One sequence [1, T] and its mask, padded to `length` with any id."""
    room = length - row.shape[1]
    sides = (room, 0) if left else (0, room)
    return pad(row, sides, value=value), pad(torch.ones_like(row), sides)


def tokens(batch=3, length=8):
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(5))


def test_the_trunk_of_a_causal_lm_is_shared_not_copied(causal_lm):
    model = EnsembleRewardModel.from_trunk(causal_lm, num_heads=2)
    assert model.model is causal_lm.model
    assert model.lm_head is None
    with torch.no_grad():
        before = model(tokens()).logits
        causal_lm.model.embed_tokens.weight.mul_(2)
        assert not torch.equal(model(tokens()).logits, before)


def test_wrapping_a_trunk_changes_nothing_in_it(causal_lm, tiny_config):
    config = tiny_config("llama", attn_implementation="eager")
    trunk = transformers.AutoModel.from_config(config)
    trunk.layers[0].mlp = nn.Sequential(trunk.layers[0].mlp, nn.Linear(32, 32))  # as an adapter would be put in
    state = {name: value.clone() for name, value in trunk.state_dict().items()}
    trunk.train()
    trunk.layers[1].eval()
    model = EnsembleRewardModel.from_trunk(trunk)
    assert trunk.config._attn_implementation == "eager"
    assert (trunk.training, trunk.layers[1].training, model.training) == (True, False, True)
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_trunk_comes_from_a_folder_in_any_dtype(causal_lm, tmp_path):
    causal_lm.save_pretrained(tmp_path)
    model = EnsembleRewardModel.from_trunk(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert model.model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.config._attn_implementation == "eager"
    assert (model.score.num_heads, str(model.score.aggregation)) == (5, "tradeoff:0.4")
    assert model.config._name_or_path == str(tmp_path)
    assert not model.training
    same = causal_lm.model.embed_tokens.weight.bfloat16()
    assert torch.equal(model.model.embed_tokens.weight, same)


def test_an_ensemble_reward_model_gives_its_trunk(causal_lm, tmp_path):
    first = EnsembleRewardModel.from_trunk(causal_lm)
    assert EnsembleRewardModel.from_trunk(first).model is causal_lm.model
    first.save_pretrained(tmp_path)
    again = EnsembleRewardModel.from_trunk(str(tmp_path), num_heads=2)
    assert torch.equal(again.model.embed_tokens.weight, causal_lm.model.embed_tokens.weight)
    assert again.score.num_heads == 2


def test_a_bert_language_model_lacks_only_the_pooler_and_serves_as_trunk(tiny_config, tmp_path):
    transformers.AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(tmp_path)
    assert EnsembleRewardModel.from_trunk(tmp_path).config.pooling == "first"
    with pytest.raises(ValueError, match=r"got none for pooler\.dense\.bias, pooler\.dense\.weight"):
        EnsembleRewardModel.from_trunk(tmp_path, pooling="pooler")


def test_heads_follow_the_callers_numbers(causal_lm):
    model = EnsembleRewardModel.from_trunk(
        causal_lm, num_heads=3, aggregation="min", std_floor=0.1, pooling="first", append_eos=False
    )
    assert (model.score.num_heads, str(model.score.aggregation), model.score.std_floor) == (3, "min", 0.1)
    assert (model.config.num_heads, model.config.aggregation, model.config.std_floor) == (3, "min", 0.1)
    assert (model.config.pooling, model.config.append_eos) == ("first", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": EnsembleHead(31, 5)}, "head: expected hidden_size 32, got 31"),
        ({"head": EnsembleHead(32, 5), "num_heads": 4}, "head: expected num_heads 4, got 5"),
        ({"head": EnsembleHead(32, 5), "std_floor": 0.5}, "head: expected std_floor 0.5, got 0.001"),
        ({"dtype": torch.bfloat16}, "dtype: expected only with a folder or name"),
        ({"aggregation": "head:7"}, "head below 5"),
        ({"pooling": "pooler"}, "pooling: expected last or first, because LlamaModel has no pooler, got 'pooler'"),
    ],
)
def test_what_does_not_fit_the_trunk_is_refused(causal_lm, options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleRewardModel.from_trunk(causal_lm, **options)


def test_a_peft_model_and_other_modules_are_refused_with_what_to_give_instead(causal_lm):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(causal_lm, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got PeftModel \(of a PEFT model, give `get_base_model\(\)`\)"):
        EnsembleRewardModel.from_trunk(wrapped)
    assert EnsembleRewardModel.from_trunk(wrapped.get_base_model()).model is causal_lm.model


def test_adapters_in_a_shared_trunk_keep_their_weights(causal_lm):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(causal_lm, peft.LoraConfig(target_modules=["q_proj"]))
    adapters = {name: value.clone() for name, value in wrapped.state_dict().items() if "lora_" in name}
    EnsembleRewardModel.from_trunk(wrapped.get_base_model())
    after = wrapped.state_dict()
    assert adapters
    assert all(torch.equal(value, after[name]) for name, value in adapters.items())


@pytest.mark.parametrize("family", CLASSIFIERS)
@torch.no_grad()
def test_a_one_head_reward_model_keeps_its_rewards(make_classifier, family, tmp_path):
    original = make_classifier(family)
    original.save_pretrained(tmp_path)
    ids = tokens()
    want = original(ids, attention_mask=torch.ones_like(ids)).logits
    model = EnsembleRewardModel.from_sequence_classifier(str(tmp_path))
    assert (model.score.num_heads, str(model.score.aggregation)) == (1, "mean")
    assert want.std() > 0.02
    torch.testing.assert_close(model(ids).std, torch.full((3, 1), 0.501))
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    # and left padded, which BERT's own pooler would read at the padding
    left = torch.nn.functional.pad(ids, (3, 0), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    torch.testing.assert_close(model(left, mask).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_where_padding_is_the_eos_token_the_reward_is_read_where_the_models_own_head_reads_it(
    make_classifier, family, tmp_path
):
    original = make_classifier(family, pad_token_id=2, eos_token_id=2)
    model = EnsembleRewardModel.from_sequence_classifier(original)
    assert model.config.skip_token_id == 2
    model.save_pretrained(tmp_path)
    loaded = EnsembleRewardModel.from_pretrained(tmp_path)
    assert loaded.config.skip_token_id == 2
    ids = tokens(1, 8)
    endings = [ids, pad(ids, (0, 1), value=2), pad(ids, (0, 2), value=2), tokens(1, 12)]
    inside = tokens(1, 9)
    inside[0, [0, 4, 7]] = 2  # a chat template ends every turn with it, and here writes one token more
    rows = [*endings, inside]
    want = torch.cat([original(row, attention_mask=torch.ones_like(row)).logits for row in rows])
    torch.testing.assert_close(want[1:3], want[:1].expand(2, 1), rtol=0, atol=1e-5)  # the head reads before EOS
    for each in (model, loaded):
        alone = torch.cat([each(row).logits for row in rows])
        torch.testing.assert_close(alone, want, rtol=1e-5, atol=1e-5)
        for left in (False, True):
            for value in (2, 9):
                batch = [side_padded(row, 13, left, value) for row in rows]
                got = each(*map(torch.cat, zip(*batch, strict=True))).logits
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    naive = EnsembleRewardModel.from_trunk(original, head=model.score)
    assert (naive(rows[1]).logits - want[1]).abs().max() > 1e-3  # the last attended token is another


@torch.no_grad()
def test_without_a_padding_token_the_reward_is_read_at_the_last_token(make_classifier):
    for changes in ({"pad_token_id": None}, {"pad_token_id": -1}):
        original = make_classifier(eos_token_id=2, **changes)
        model = EnsembleRewardModel.from_sequence_classifier(original)
        assert model.config.skip_token_id is None
        row = pad(tokens(1), (0, 1), value=2)
        torch.testing.assert_close(model(row).logits, original(row).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_sequence_of_padding_tokens_alone_is_read_at_its_first(make_classifier):
    original = make_classifier(pad_token_id=2)
    model = EnsembleRewardModel.from_sequence_classifier(original)
    row = torch.full((1, 3), 2)
    torch.testing.assert_close(model(row).logits, original(row).logits, rtol=1e-5, atol=1e-5)


def test_an_encoder_reads_its_first_token_whatever_its_padding_is(make_classifier):
    assert EnsembleRewardModel.from_sequence_classifier(make_classifier("bert")).config.skip_token_id is None


def test_a_head_that_reads_padding_at_the_end_is_told_by_its_rewards(make_classifier):
    class LastToken(transformers.LlamaForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, **_):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.score(hidden[:, -1]))

    with pytest.raises(
        ValueError,
        match=r"LastToken: expected the reward to be one linear layer on .* not padding: the model's rewards are",
    ):
        EnsembleRewardModel.from_sequence_classifier(LastToken(make_classifier().config).eval())


@torch.no_grad()
def test_the_converted_model_saves_and_loads_with_the_same_rewards(make_classifier, tmp_path):
    for family in ("llama", "bert"):
        folder = tmp_path / family
        model = EnsembleRewardModel.from_sequence_classifier(make_classifier(family))
        model.save_pretrained(folder)
        loaded = EnsembleRewardModel.from_pretrained(folder)
        assert loaded.config.pooling == ("pooler" if family == "bert" else "last")
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_head_with_a_bias_is_carried_over(make_classifier):
    original = make_classifier()
    weight = original.score.weight
    original.score = nn.Linear(32, 1)
    original.score.weight.copy_(weight)
    original.score.bias.fill_(2.5)
    model = EnsembleRewardModel.from_sequence_classifier(original)
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_instance_is_shared_and_left_in_the_mode_it_was_in(make_classifier):
    original = make_classifier().train()
    model = EnsembleRewardModel.from_sequence_classifier(original, append_eos=False)
    assert model.model is original.model
    assert original.training
    assert original.model.layers[0].training
    assert model.config.append_eos is False


@torch.no_grad()
def test_a_bf16_reward_model_agrees_to_its_own_rounding(make_classifier, tmp_path):
    original = make_classifier().bfloat16()
    original.save_pretrained(tmp_path)
    model = EnsembleRewardModel.from_sequence_classifier(str(tmp_path))
    assert model.model.dtype == torch.bfloat16
    want = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)(tokens()).logits.float()
    torch.testing.assert_close(model(tokens()).logits, want, rtol=0.02, atol=0.02)


def test_several_labels_are_refused_before_anything_is_loaded(make_classifier, tmp_path):
    make_classifier(num_labels=3).config.save_pretrained(tmp_path)  # a configuration alone
    with pytest.raises(ValueError, match=r"num_labels: expected 1 .*, got 3 in the 'llama' configuration"):
        EnsembleRewardModel.from_sequence_classifier(str(tmp_path))


def test_a_head_with_a_hidden_layer_is_refused_by_name(make_classifier):
    with pytest.raises(
        ValueError, match=r"classifier: expected one linear layer .* RobertaForSequenceClassification, got RobertaClass"
    ):
        EnsembleRewardModel.from_sequence_classifier(make_classifier("roberta"))


def test_an_architecture_with_a_layer_before_its_linear_head_is_refused_by_its_rewards(make_classifier):
    with pytest.raises(ValueError, match="ModernBertForSequenceClassification: expected the reward to be"):
        EnsembleRewardModel.from_sequence_classifier(make_classifier("modernbert"))


def test_a_head_of_the_wrong_shape_is_refused(make_classifier):
    original = make_classifier()
    original.score = nn.Linear(32, 2)
    with pytest.raises(ValueError, match=r"score\.weight: expected shape \[1, 32\], got \[2, 32\]"):
        EnsembleRewardModel.from_sequence_classifier(original)


def test_loading_options_reach_the_files_and_are_refused_beside_an_instance(make_classifier, tmp_path):
    make_classifier().save_pretrained(tmp_path / "part")
    model = EnsembleRewardModel.from_sequence_classifier(str(tmp_path), subfolder="part", dtype=torch.bfloat16)
    assert model.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="from_sequence_classifier: dtype: expected only with a folder or name"):
        EnsembleRewardModel.from_sequence_classifier(make_classifier(), dtype=torch.bfloat16)


def test_a_model_without_a_head_is_refused(causal_lm):
    causal_lm.config.num_labels = 1
    with pytest.raises(ValueError, match="score: expected one linear layer as the head of LlamaForCausalLM, got none"):
        EnsembleRewardModel.from_sequence_classifier(causal_lm)


@pytest.mark.parametrize(
    ("num_labels", "says"),
    [
        (2, "expected a reward model, got LlamaForCausalLM, a model without a reward head"),
        (1, r".* got none for score\.weight"),  # called a classifier
    ],
)
def test_a_plain_language_model_is_refused_for_its_missing_head(causal_lm, tmp_path, num_labels, says):
    causal_lm.config.num_labels = num_labels
    causal_lm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"from_sequence_classifier: {says}"):
        EnsembleRewardModel.from_sequence_classifier(str(tmp_path))
