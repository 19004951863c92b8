"""Where the response begins in an item's tokens, and what a `Scorer` of a model that averages over it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.engine.text import Encoded, ItemEncoder

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
# a finished turn is written otherwise than an opened one, as by templates with think blocks
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
STRICT = "{% if messages[-1].role == 'user' %}{{ raise_exception('no') }}{% endif %}" + THINKING


@pytest.fixture
def make_scorer(tiny_trunk, make_tokenizer):
    def build(family: str = "llama", template: Any = True, taps: Any = "wide", **options: Any) -> Scorer:
        trunk = tiny_trunk(family)
        with torch.no_grad():
            for parameter in trunk.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)  # initial weights hardly tell one text from another
        tokenizer = make_tokenizer(chat=template is True)
        if isinstance(template, str):
            tokenizer.chat_template = template
        return Scorer(EnsembleRewardModel.from_trunk(trunk, taps=taps), tokenizer, progress=False, **options)

    return build


def response_of(scorer: Scorer, item: Any) -> str:
    read = scorer.read(item)
    return str(scorer._encoder.tokenizer.decode(read.ids[read.start :]))


@pytest.mark.parametrize(
    ("item", "response"),
    [
        ({"prompt": "Why?", "response": "Because."}, "Because.<|end|>\n"),
        ({"prompt": "Why?", "response": "Becau", "complete": False}, "Becau"),
        ({"prompt": {"system": "Be brief.", "text": "Why?"}, "response": "Because."}, "Because.<|end|>\n"),
        ({"prompt": [SYSTEM, USER], "response": [ANSWER]}, "Because.<|end|>\n"),
        ([SYSTEM, USER, ANSWER], "Because.<|end|>\n"),
        ([USER, ANSWER, USER, {**ANSWER, "content": "So."}], "So.<|end|>\n"),
        ({"messages": [USER, ANSWER, USER]}, "Because.<|end|>\n<|user|>Why?<|end|>\n"),
        ([USER, {"role": "model", "content": "Because."}], "model|>Because.<|end|>\n"),
        ([ANSWER], "<|assistant|>Because.<|end|>\n"),  # without a prompt, all of it
        ({"prompt": "Why?", "response": "", "complete": False}, ">"),  # at least the last token
    ],
)
def test_a_chats_response_begins_where_its_opened_turn_ends(make_scorer, item, response):
    assert response_of(make_scorer(), item) == response


@pytest.mark.parametrize(
    ("item", "response"),
    [
        ({"prompt": "Why? ", "response": "Because."}, "Because.</s>"),
        ({"prompt": "", "response": "Because."}, "Because.</s>"),
        ("Why? Because.", "Why? Because.</s>"),
        ([5, 6, 7], None),
    ],
)
def test_a_plain_texts_response_begins_behind_its_prompt_or_is_all_of_it(make_scorer, item, response):
    scorer = make_scorer(template=None)
    if response is None:
        assert scorer.read(item) == Encoded(item, False, 0)
    else:
        assert response_of(scorer, item) == response


def test_a_template_that_opens_a_turn_otherwise_than_it_writes_one_shares_what_it_shares(make_scorer):
    assert response_of(make_scorer(template=THINKING), [USER, ANSWER]) == "Because.<|end|>"


def test_a_prompt_that_the_template_refuses_alone_is_named(make_scorer):
    scorer = make_scorer(template=STRICT)
    with pytest.raises(ValueError, match=r"item 3: expected a prompt that can be read alone, to find where .*: no"):
        scorer.read([USER, ANSWER], "item 3")
    assert scorer.encode([USER, ANSWER])


def test_truncation_moves_the_beginning_and_keeps_a_bos_out_of_the_response(make_scorer):
    item = {"prompt": "0123456789", "response": "abc"}
    whole = make_scorer(template=None).read(item)
    assert (len(whole.ids), whole.start) == (14, 10)
    cut = make_scorer(template=None, max_length=6).read(item)
    assert cut == Encoded(whole.ids[8:], True, 2)
    inside = make_scorer(template=None, max_length=3).read(item)
    assert inside == Encoded(whole.ids[11:], True, 0)
    scorer = make_scorer(template=None, max_length=3)
    scorer._encoder._kept = {whole.ids[0]}
    assert scorer.read(item) == Encoded([whole.ids[0], *whole.ids[12:]], True, 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_scorer_averages_over_the_response_it_found(make_scorer, family):
    scorer = make_scorer(family)
    items = [{"prompt": "Why?", "response": "Because." * n} for n in (1, 5, 2)] + [[5, 6, 7]]
    found = scorer.features(items)
    for item, got in zip(items, found, strict=True):
        read = scorer.read(item)
        ids = torch.tensor([read.ids])
        states = scorer.model.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        place = 0 if family == "bert" else -1
        want = torch.cat([states.hidden_states[2][0, place], states.hidden_states[1][0, read.start :].mean(0)])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.features([scorer.read(item) for item in items]), found, rtol=0, atol=0)


def test_equal_tokens_with_another_beginning_are_scored_apart(make_scorer):
    scorer = make_scorer(template=None)
    items = [{"prompt": "ab", "response": "cdef"}, {"prompt": "abcd", "response": "ef"}]
    one, other = scorer.score(items).reward
    assert scorer.encode(items[0]) == scorer.encode(items[1])
    assert one != other
    assert scorer.score(items[::-1]).reward == [other, one]
    last = make_scorer(template=None, taps=None)
    assert len(set(last.score(items).reward)) == 1


def test_a_prompt_is_encoded_once_for_all_its_responses_and_never_without_a_mean(make_scorer, monkeypatch):
    items = [{"prompt": "Why?", "response": str(i)} for i in range(50)]
    calls: list[str] = []
    tokens = ItemEncoder._tokens

    def counting(self, text, **options):
        calls.extend([text] if isinstance(text, str) else text)
        return tokens(self, text, **options)

    monkeypatch.setattr(ItemEncoder, "_tokens", counting)
    for taps, texts in (("wide", 51), (["last:1"], 50), (None, 50)):
        calls.clear()
        make_scorer(template=None, taps=taps).features(items)
        assert len(calls) == texts
