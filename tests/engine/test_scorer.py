"""Scorer: every form of item, how sequences end and are cut, order, batches, and numbers that are not finite."""

from __future__ import annotations

import logging
import math
import random

import pytest
import torch

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.engine.scorer import micro_batches
from prudent.kernels import aggregate, philox_normal

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
TEXTS = [f"Item {i} " + "and more " * (i * 7 % 11) for i in range(23)]


@pytest.fixture
def make_scorer(tiny_trunk, make_tokenizer):
    def build(family="llama", chat=False, special=None, seed=0, head=None, append_eos=None, **options):
        torch.manual_seed(1)
        trunk = tiny_trunk(family, seed=seed)
        with torch.no_grad():
            for parameter in trunk.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)  # initial weights hardly tell one text from another
        model = EnsembleRewardModel.from_trunk(trunk, head=head, append_eos=append_eos)
        return Scorer(model, make_tokenizer(chat, **(special or {})), progress=False, **options)

    return build


def decoded(scorer, item):
    return scorer._encoder.tokenizer.decode(scorer.encode(item))


def test_a_text_ends_with_eos_and_token_ids_are_left_alone(make_scorer):
    scorer = make_scorer()
    assert decoded(scorer, "Hello.") == "Hello.</s>"
    assert scorer.encode([5, 6, 7]) == [5, 6, 7]
    assert scorer.encode((5, 6, 7)) == [5, 6, 7]


def test_the_models_policy_decides_about_eos(make_scorer):
    assert decoded(make_scorer(append_eos=False), "Hello.") == "Hello."
    assert decoded(make_scorer("bert"), "Hello.") == "Hello."


def test_eos_is_not_put_twice(make_scorer):
    assert decoded(make_scorer(), "Hello.</s>") == "Hello.</s>"


def test_prompt_and_response_without_a_chat_template_are_joined_as_they_are(make_scorer):
    scorer = make_scorer()
    assert decoded(scorer, {"prompt": "Why? ", "response": "Because."}) == "Why? Because.</s>"
    assert decoded(scorer, {"prompt": "Why? ", "response": "Becau", "complete": False}) == "Why? Becau"


def test_prompt_and_response_with_a_chat_template_become_two_turns(make_scorer):
    scorer = make_scorer(chat=True)
    want = "<|user|>Why?<|end|>\n<|assistant|>Because.<|end|>\n"
    for item in (
        CHAT,
        {"messages": CHAT},
        {"prompt": "Why?", "response": "Because.", "source": "anything else is ignored"},
        {"prompt": CHAT[:1], "response": "Because."},
        {"prompt": "Why?", "response": CHAT[1:]},
        {"prompt": CHAT[:1], "response": CHAT[1:]},
    ):
        assert decoded(scorer, item) == want


def test_a_response_cut_off_leaves_its_turn_open(make_scorer):
    scorer = make_scorer(chat=True)
    opened = "<|user|>Why?<|end|>\n<|assistant|>"
    assert decoded(scorer, {"prompt": "Why?", "response": "Becau", "complete": False}) == opened + "Becau"
    assert decoded(scorer, {"messages": CHAT, "complete": False}) == opened + "Because."
    assert decoded(scorer, {"prompt": "Why?", "response": "", "complete": False}) == opened


def test_a_plain_text_stays_plain_beside_a_chat_template(make_scorer):
    assert decoded(make_scorer(chat=True), "Hello.") == "Hello.</s>"


def test_too_long_items_lose_their_beginning_and_are_counted(make_scorer, caplog):
    scorer = make_scorer(max_length=6)
    assert decoded(scorer, "abcdefgh") == "defgh</s>"
    with caplog.at_level(logging.WARNING):
        scores = scorer.score(["abcdefgh", "abc", list(range(4, 11))])
    assert scores.num_truncated == 2
    assert "2 of 3 items are longer than 6 tokens" in caplog.text
    assert scores.reward[0] == scorer.score([scorer.encode("defgh")]).reward[0]


def test_an_opening_bos_survives_truncation(make_scorer):
    scorer = make_scorer(special={"bos_token": "<s>"}, max_length=4)
    assert scorer.encode([1, 10, 11, 12, 13, 14]) == [1, 12, 13, 14]
    assert scorer.encode([9, 10, 11, 12, 13, 14]) == [11, 12, 13, 14]


@pytest.mark.parametrize(("family", "limit"), [("llama", 128), ("gpt2", 128), ("bert", 128), ("roberta", 126)])
def test_the_default_limit_is_the_trunks_positions_and_all_of_them_can_be_scored(make_scorer, family, limit):
    scorer = make_scorer(family)
    assert scorer.max_length == limit
    scores = scorer.score([[9] * 500, [9] * limit])
    assert scores.num_truncated == 1
    assert scores.reward[0] == scores.reward[1]


@pytest.mark.parametrize(
    ("trained", "asked", "limit"), [(6, None, 6), (6, 20, 20), (4000, None, 128), (None, None, 128)]
)
def test_the_length_the_heads_were_trained_on_is_saved_and_is_the_default(
    tiny_trunk, make_tokenizer, tmp_path, trained, asked, limit
):
    EnsembleRewardModel.from_trunk(tiny_trunk(), max_score_length=trained).save_pretrained(tmp_path)
    model = EnsembleRewardModel.from_pretrained(tmp_path)
    assert model.config.max_score_length == trained
    assert Scorer(model, make_tokenizer(), max_length=asked, progress=False).max_length == limit


def test_order_is_kept_and_scores_do_not_depend_on_it_to_the_last_bit(make_scorer):
    scorer = make_scorer(batch_tokens=150)
    straight = scorer.score(TEXTS)
    order = list(range(len(TEXTS)))
    random.Random(0).shuffle(order)
    shuffled = scorer.score([TEXTS[i] for i in order])
    assert shuffled.reward == [straight.reward[i] for i in order]
    assert torch.equal(shuffled.mean, straight.mean[order])
    assert torch.equal(shuffled.std, straight.std[order])
    assert len(set(straight.reward)) == len(TEXTS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_an_item_scores_the_same_in_any_company_up_to_rounding(make_scorer, family):
    alone, all_at_once = (make_scorer(family, batch_tokens=budget).score(TEXTS) for budget in (1, 10**6))
    assert alone.mean.std(0).min() > 0.01
    torch.testing.assert_close(alone.mean, all_at_once.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.std, all_at_once.std, rtol=0, atol=1e-5)


def batches_of(scorer, items):
    """The micro-batches that reach the trunk, as lists of token ids."""
    batches = []
    hook = scorer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    scores = scorer.score(items)
    hook.remove()
    return batches, scores


def test_micro_batches_are_the_same_in_any_order_of_the_items_equal_lengths_included(make_scorer):
    scorer, items = make_scorer(batch_tokens=12), [[i, 9, 9] for i in range(20)]
    batches, _ = batches_of(scorer, items)
    assert max(map(len, batches)) == 4
    assert batches_of(scorer, items[::-1])[0] == batches


def test_equal_items_are_scored_once_and_alike(make_scorer):
    batches, scores = batches_of(make_scorer(batch_tokens=40), ["same"] * 50 + ["other"])
    assert sum(len(batch) for batch in batches) == 2
    assert len(set(scores.reward)) == 2


def test_micro_batches_hold_at_most_the_budget_and_at_least_one():
    lengths = [50, 20, 9, 9, 9, 5, 5, 1]
    assert [lengths[part] for part in micro_batches(lengths, 30)] == [[50], [20], [9, 9, 9], [5, 5, 1]]


def test_scores_are_the_models_own_forward(make_scorer):
    scorer = make_scorer()
    scores = scorer.score(TEXTS[:1])
    with torch.no_grad():
        out = scorer.model(torch.tensor([scorer.encode(TEXTS[0])]))
    torch.testing.assert_close(scores.mean, out.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(scores.reward), out.logits[:, 0], rtol=0, atol=1e-6)


def test_features_are_in_order_in_the_trunks_dtype_and_give_the_scores(make_scorer):
    scorer = make_scorer(batch_tokens=150)
    scorer.model.model.bfloat16()
    features = scorer.features(TEXTS)
    assert features.shape == (len(TEXTS), 32)
    assert features.dtype == torch.bfloat16
    assert not features.requires_grad
    torch.testing.assert_close(scorer.model.score(features).mean, scorer.score(TEXTS).mean, rtol=0, atol=1e-5)


def test_reward_nominal_and_worst_are_what_their_names_say(make_scorer):
    scores = make_scorer().score(TEXTS, aggregation="tradeoff:0.3")
    nominal = scores.mean.gather(1, scores.std.argmin(1, keepdim=True))[:, 0]
    worst = scores.mean.min(1).values
    assert scores.nominal == nominal.tolist()
    assert scores.worst == worst.tolist()
    assert scores.reward == pytest.approx((0.3 * nominal + 0.7 * worst).tolist())


def test_relative_std_uses_the_heads_own_reference(make_scorer):
    scorer = make_scorer()
    scorer.model.score.std_ref.copy_(torch.tensor([1.0, 1.0, 1e6, 1.0, 1.0]))
    scores = scorer.score(TEXTS, aggregation="nominal,nominal=relative_std")
    assert scores.reward == scores.nominal == scores.mean[:, 2].tolist()


def test_the_models_own_aggregation_is_the_default(make_scorer):
    scorer = make_scorer()
    scorer.model.score.aggregation = "max"
    scores = scorer.score(TEXTS)
    assert scores.reward == scores.mean.max(1).values.tolist()


def test_a_seed_samples_every_head_reproducibly(make_scorer):
    scorer = make_scorer()
    scores = scorer.score(TEXTS, aggregation="cvar:0.5", seed=11)
    sample = scores.mean + scores.std * philox_normal(torch.tensor([11]), len(TEXTS), 5)
    assert scores.worst == sample.min(1).values.tolist()
    want = aggregate(scores.mean, scores.std, sample, scorer.model.score.aggregation.parse("cvar:0.5"))
    assert scores.reward == want.tolist()
    assert scores.reward == scorer.score(TEXTS, aggregation="cvar:0.5", seed=11).reward
    assert scores.reward != scorer.score(TEXTS, aggregation="cvar:0.5", seed=12).reward
    assert scorer.score(TEXTS, aggregation="min,source=mean", seed=11).reward == scores.mean.min(1).values.tolist()


def test_results_that_are_not_finite_are_counted_and_none(make_scorer, monkeypatch, caplog):
    scorer = make_scorer()
    first = scorer.features(TEXTS)[:, 0]
    cut = first.sort().values[7]
    bad = (first < cut).tolist()
    forward = scorer.model.score.forward

    def poison(hidden, *args, **kwargs):
        out = forward(hidden, *args, **kwargs)
        return out._replace(mean=torch.where(hidden[:, :1] < cut, torch.nan, out.mean))

    monkeypatch.setattr(scorer.model.score, "forward", poison)
    assert sum(bad) == 7
    with caplog.at_level(logging.WARNING):
        scores = scorer.score(TEXTS, aggregation="mean,centre=batch")
    assert scores.num_nonfinite == sum(bad)
    assert f"{sum(bad)} of {len(TEXTS)} items have a reward that is not finite" in caplog.text
    for values in (scores.reward, scores.nominal, scores.worst):
        assert [value is None for value in values] == bad
        assert all(value is None or math.isfinite(value) for value in values)
    assert sum(value for value in scores.reward if value is not None) == pytest.approx(0, abs=1e-4)
    good = torch.tensor([not b for b in bad])
    worst = scorer.score(TEXTS, aggregation="batch_worst").reward  # of the finite items
    assert torch.tensor([v for v in worst if v is not None]).equal(
        scores.mean[good][:, scores.mean[good].mean(0).argmin()]
    )


def test_one_head_that_is_not_finite_spoils_the_item_even_where_another_is_nominal(make_scorer):
    scorer = make_scorer()
    with torch.no_grad():
        scorer.model.score.bias[3] = torch.inf
    scores = scorer.score(TEXTS, aggregation="nominal")
    assert scores.reward == [None] * len(TEXTS)
    assert scores.num_nonfinite == len(TEXTS)


def test_every_module_is_back_in_its_own_mode_also_after_an_error(make_scorer):
    scorer = make_scorer("gpt2")
    model = scorer.model.train()
    model.model.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert scorer.score(TEXTS).reward == scorer.score(TEXTS).reward  # no dropout
    assert [module.training for module in model.modules()] == modes
    model.score.forward = None
    with pytest.raises(TypeError):
        scorer.score(TEXTS)
    assert [module.training for module in model.modules()] == modes


def test_gradients_still_flow_through_the_trunk_after_scoring(make_scorer):
    scorer = make_scorer()
    scorer.score(TEXTS)
    scorer.model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert scorer.model.model.embed_tokens.weight.grad[5].any()


def test_a_tokeniser_without_padding_token_will_do(make_scorer):
    scorer = make_scorer(special={"pad_token": ""})
    assert scorer._encoder.tokenizer.pad_token_id is None
    assert None not in scorer.score(TEXTS).reward


def test_no_items_make_no_scores(make_scorer):
    scores = make_scorer().score([])
    assert scores.reward == scores.nominal == scores.worst == []
    assert scores.mean.shape == scores.std.shape == (0, 5)


def test_a_peft_model_is_scored_with_its_adapters_and_its_trained_head(make_scorer, make_tokenizer):
    peft = pytest.importorskip("peft")
    scorer = make_scorer()
    plain = scorer.score(TEXTS[:3])
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False)
    wrapped = peft.get_peft_model(scorer.model, lora)
    with torch.no_grad():
        wrapped.score.modules_to_save["default"].bias[0] += 1
    scores = Scorer(wrapped, make_tokenizer(), progress=False).score(TEXTS[:3])
    assert ((scores.mean - plain.mean)[:, 0] > 0.5).all()
    assert (scores.mean - plain.mean)[:, 1].abs().min() > 1e-6
    assert scores.reward == pytest.approx([x[0].item() for x in wrapped(*_batch(scorer, TEXTS[:3])).logits], abs=1e-5)


def _batch(scorer, texts):
    encoded = [scorer.encode(text) for text in texts]
    length = max(map(len, encoded))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in encoded])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in encoded])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("", "item 1: expected some text, got an empty string"),
        ({"prompt": "", "response": ""}, "item 1: expected some text"),
        ([], "item 1: expected text or token ids, got no tokens"),
        (
            {"prompt": "a", "reply": "b"},
            "item 1: expected the keys prompt and response, or messages, got prompt, reply",
        ),
        ({}, "item 1: expected the keys prompt and response, or messages, got none"),
        ({"prompt": "a", "response": 3}, "item 1: response: expected messages .role, content., got int"),
        ({"prompt": "a", "response": "b", "complete": 1}, "item 1: complete: expected true or false, got 1"),
        (
            CHAT,
            r"item 1: expected plain text, because the tokeniser has no chat template, got messages \(roles: user, "
            r"assistant\): give plain texts, or a model whose tokeniser has a chat template",
        ),
        ({"prompt": CHAT, "response": "b"}, "item 1: expected plain text, because the tokeniser has no chat template"),
        ({"messages": "Why?"}, "item 1: expected messages .role, content., got str"),
        ([{"role": "user"}], "item 1: expected messages with a role and a content that are texts"),
        (["a", "b"], "item 1: expected a text, token ids, messages, or a mapping .* got list"),
        ([1.5], "item 1: expected a text, token ids"),
        ([True], "item 1: expected a text, token ids"),
        (None, "item 1: expected a text, token ids, messages, .* got NoneType"),
        ([4, 300], r"item 1: expected token ids in \[0, 300\) \(the trunk's vocabulary\), got 300"),
        ([4, -1], r"item 1: expected token ids in \[0, 300\) .* got -1"),
    ],
)
def test_an_item_of_no_form_is_refused_by_its_index(make_scorer, item, message):
    with pytest.raises(ValueError, match=message):
        make_scorer().score(["fine", item])


def test_no_messages_are_refused_under_a_chat_template(make_scorer):
    with pytest.raises(ValueError, match="item 0: expected at least one message, got none"):
        make_scorer(chat=True).score([{"messages": []}])


def test_one_text_in_place_of_a_list_is_refused(make_scorer):
    with pytest.raises(ValueError, match="items: expected a list of items, got str"):
        make_scorer().score("a text")


def test_a_tokeniser_without_eos_is_refused_where_the_model_wants_one(make_scorer):
    scorer = make_scorer(special={"eos_token": ""})
    with pytest.raises(ValueError, match="expected an EOS token, because the model's append_eos is true, got none"):
        scorer.score(["a"])
    assert make_scorer(special={"eos_token": ""}, append_eos=False).score(["a"]).num_nonfinite == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens: expected a number above 0, got 0"),
        ({"max_length": 0}, "max_length: expected 1 to 128"),
        ({"max_length": 129}, r"max_length: expected 1 to 128 \(the trunk's positions\), got 129"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make_scorer, options, message):
    with pytest.raises(ValueError, match=message):
        make_scorer(**options)


@pytest.mark.parametrize(
    ("aggregation", "message"),
    [("mean,centre=group", "expected centre=none or centre=batch"), ("head:5", "head below 5")],
)
def test_an_aggregation_that_a_list_cannot_have_is_refused(make_scorer, aggregation, message):
    with pytest.raises(ValueError, match=message):
        make_scorer().score(TEXTS, aggregation=aggregation)


def test_a_real_model_scores_real_text(shared_dir):
    transformers = pytest.importorskip("transformers")
    folder = shared_dir / "models" / "stories260k"
    model = EnsembleRewardModel.from_trunk(str(folder))
    scorer = Scorer(model, transformers.AutoTokenizer.from_pretrained(folder), progress=False)
    stories = ["Once upon a time there was a little girl named Lily.", "Tim had a red ball. He played all day."]
    scores = scorer.score(stories)
    assert scores.num_nonfinite == 0
    assert scores.reward[0] != scores.reward[1]
    assert scorer.score(stories[::-1]).reward == scores.reward[::-1]
