"""Reading many items with one call of the tokeniser gives the ids that reading them one by one gives."""

from __future__ import annotations

import random

import pytest

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.engine.text import Encoded, ItemEncoder, ItemError

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("ab é\n☃", k=draw.randint(1, 60))) for _ in range(count)]


def plain_items() -> list:
    pairs = [{"prompt": a, "response": b} for a, b in zip(texts(30), reversed(texts(30)), strict=True)]
    cut = [{**pair, "complete": False} for pair in pairs[:10]]
    return [*texts(20), *pairs, *cut, [5, 6, 7], "ends with it</s>", Encoded([4, 5], False), *pairs[:3]]


def chat_items() -> list:
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": a + "!"}] for a in texts(30)]
    cut = [{"messages": chat, "complete": False} for chat in turns[:10]]
    opened = [{"prompt": a, "response": "", "complete": False} for a in texts(5)]
    rendered = [{"rendered": f"<|user|>a<|end|>\n<|assistant|>{a}<|end|>"} for a in texts(5)]
    return [*turns, *cut, *opened, *rendered, *plain_items()]


@pytest.mark.parametrize("finds_response", [False, True])
@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize("chat", [False, True])
def test_the_ids_are_those_of_one_by_one(make_tokenizer, chat, max_length, finds_response):
    def build() -> ItemEncoder:
        return ItemEncoder(
            make_tokenizer(chat=chat),
            append_eos=True,
            max_length=max_length,
            vocab_size=300,
            finds_response=finds_response,
        )

    items = chat_items() if chat else plain_items()
    together, alone = build(), build()
    assert together.read_all(items) == [alone.read(item) for item in items]


def test_the_tokeniser_is_called_once_for_all_texts_of_a_kind(make_tokenizer):
    tokenizer = make_tokenizer(chat=True)
    encoder = ItemEncoder(tokenizer, append_eos=True, max_length=None, vocab_size=300)
    calls = []
    whole = type(tokenizer).__call__

    class Counting(type(tokenizer)):
        def __call__(self, text, **options):
            calls.append(text)
            return whole(self, text, **options)

    tokenizer.__class__ = Counting
    encoder.read_all(["a", "b", [{"role": "user", "content": "c"}], [{"role": "user", "content": "d"}]])
    assert [len(batch) for batch in calls] == [2, 2]


@pytest.mark.parametrize("chat", [False, True])
def test_the_text_of_an_item_has_its_ids(make_tokenizer, chat):
    tokenizer = make_tokenizer(chat=chat)
    encoder = ItemEncoder(tokenizer, append_eos=True, max_length=None, vocab_size=300)
    items = [{"prompt": "a", "response": "b", "complete": complete} for complete in (True, False)]
    for item in [*items, {"prompt": "a", "response": "b</s>"}]:
        ids = tokenizer(encoder.text_of(item), add_special_tokens=not chat)["input_ids"]
        assert ids == encoder.encode(item)[0]
    with pytest.raises(ItemError, match="expected a text or messages, got token ids"):
        encoder.text_of([5, 6])


@pytest.mark.parametrize("broken", ["", "\ud800", [], [3, 400], {"prompt": "a"}, [{"role": "user"}]])
def test_the_error_names_the_first_item_that_cannot_be_read(make_tokenizer, broken):
    encoder = ItemEncoder(make_tokenizer(chat=True), append_eos=True, max_length=None, vocab_size=300)
    with pytest.raises(ItemError, match=r"^Scorer: item 702: "):
        encoder.read_all(["fine", "fine too", broken, "", "fine"], 700)


def test_a_tokeniser_that_is_not_a_fast_one_gets_one_text_at_a_time(make_tokenizer):
    fast = make_tokenizer()

    class OneText:
        chat_template = None
        eos_token_id, bos_token_id, cls_token_id = fast.eos_token_id, None, None

        def __call__(self, text):
            assert isinstance(text, str)
            return {"input_ids": fast(text)["input_ids"]}

    encoder = ItemEncoder(OneText(), append_eos=True, max_length=None, vocab_size=300)
    assert encoder.read_all(["ab", "c"]) == [encoder.read("ab"), encoder.read("c")]


def test_a_scorer_scores_many_items_as_it_scores_each(tiny_trunk, make_tokenizer):
    scorer = Scorer(EnsembleRewardModel.from_trunk(tiny_trunk()), make_tokenizer(), progress=False)
    items = [*texts(600), {"prompt": "a", "response": "b"}]  # more than are read together
    encoded = [scorer.read(item) for item in items]
    assert scorer.score(items).reward == scorer.score(encoded).reward
