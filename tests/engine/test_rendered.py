"""Texts that a chat template has written already: they get the ids of the chat they were written from."""

from __future__ import annotations

from typing import Any

import pytest

from prudent.engine.text import ItemEncoder, ItemError

TEMPLATES = {
    # the turn goes on after the policy's stop token, as in Qwen
    "newline": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # a blank before the stop token
    "blank": "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}",
    # BOS, and a user turn that opens the answer, as in Mistral
    "inst": "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}",
}
PROMPT = [{"role": "user", "content": "good day"}]


@pytest.fixture(params=sorted(TEMPLATES))
def encoder(request: Any, make_tokenizer: Any) -> ItemEncoder:
    return _encoder(make_tokenizer, TEMPLATES[request.param])


def _encoder(make_tokenizer: Any, template: str = "", **options: Any) -> ItemEncoder:
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = template or None
    return ItemEncoder(tokenizer, **{"append_eos": True, "max_length": None, "vocab_size": 300, **options})


def _written(encoder: ItemEncoder, response: str) -> tuple[str, str]:
    """(the opened prompt, the complete chat), as the tokeniser's template writes them."""
    write = encoder.tokenizer.apply_chat_template
    opened = write(PROMPT, tokenize=False, add_generation_prompt=True)
    return opened, write([*PROMPT, {"role": "assistant", "content": response}], tokenize=False)


def test_a_written_chat_has_the_ids_of_the_chat(encoder: ItemEncoder) -> None:
    _, whole = _written(encoder, "fine")
    expected = encoder.encode({"prompt": PROMPT, "response": "fine"})
    assert encoder.encode({"rendered": whole}) == expected
    assert encoder.encode({"rendered": whole.removeprefix("<s>")}) == expected  # verl takes BOS away


def test_a_policys_stop_token_is_closed_as_the_template_closes_a_turn(encoder: ItemEncoder) -> None:
    opened, _ = _written(encoder, "fine")
    expected = encoder.encode({"prompt": PROMPT, "response": "fine"})
    # Mistral's turns end with </s> alone
    for end in ("</s>",) if "[INST]" in opened else ("<|end|>", "</s>", "<|end|></s>"):
        assert encoder.encode({"rendered": f"{opened}fine{end}", "prompt": opened}) == expected


def test_a_text_without_an_end_was_truncated(encoder: ItemEncoder) -> None:
    opened, _ = _written(encoder, "fine")
    expected = encoder.encode({"prompt": PROMPT, "response": "fine", "complete": False})
    assert encoder.encode({"rendered": f"{opened}fine", "prompt": opened}) == expected


def test_complete_overrides_the_end(encoder: ItemEncoder) -> None:
    opened, whole = _written(encoder, "fine")
    assert encoder.encode({"rendered": f"{opened}fine", "complete": True}) == encoder.encode({"rendered": whole})
    truncated = encoder.encode({"rendered": f"{opened}fine"})
    assert encoder.encode({"rendered": f"{opened}fine</s>", "complete": False}) == truncated


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_the_response_begins_after_the_prompt_or_the_last_opening(make_tokenizer: Any, template: str) -> None:
    encoder = _encoder(make_tokenizer, TEMPLATES[template], finds_response=True)
    opened, whole = _written(encoder, "fine")
    expected = encoder.read({"prompt": PROMPT, "response": "fine"})
    assert expected.start > 0
    assert encoder.read({"rendered": whole, "prompt": opened}) == expected
    assert encoder.read({"rendered": whole}) == expected
    assert encoder.read({"rendered": whole, "prompt": "another prompt"}) == expected


class TestWithoutATemplate:
    def test_the_text_is_plain_and_eos_says_whether_it_is_complete(self, make_tokenizer: Any) -> None:
        encoder = _encoder(make_tokenizer)
        complete = encoder.encode({"prompt": "good ", "response": "day"})
        truncated = encoder.encode({"prompt": "good ", "response": "day", "complete": False})
        assert truncated[0] == complete[0][:-1]
        assert encoder.encode({"rendered": "good day</s>"}) == complete
        assert encoder.encode({"rendered": "good day", "prompt": "good "}) == truncated
        assert encoder.encode({"rendered": "good day", "complete": True}) == complete

    def test_eos_is_not_kept_for_a_model_that_was_taught_without_it(self, make_tokenizer: Any) -> None:
        encoder = _encoder(make_tokenizer, append_eos=False)
        assert encoder.encode({"rendered": "good day</s>"}) == encoder.encode("good day")

    def test_the_response_begins_after_the_prompt_which_is_then_needed(self, make_tokenizer: Any) -> None:
        encoder = _encoder(make_tokenizer, finds_response=True)
        expected = encoder.read({"prompt": "good ", "response": "day"})
        assert encoder.read({"rendered": "good day</s>", "prompt": "good "}) == expected
        with pytest.raises(
            ItemError, match="expected its prompt too, because the model reads where the response begins"
        ):
            encoder.read({"rendered": "good day</s>"})


def test_a_text_in_another_template_is_refused(encoder: ItemEncoder) -> None:
    with pytest.raises(
        ItemError, match="expected a text in the reward model's chat template, with an assistant's turn"
    ):
        encoder.encode({"rendered": "<start_of_turn>user\nhi<end_of_turn>"})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"rendered": 3}, "rendered: expected a text, got int"),
        ({"rendered": "a", "prompt": []}, "prompt: expected a text, got list"),
        ({"rendered": "a", "complete": "yes"}, "complete: expected true or false, got str"),
    ],
)
def test_a_broken_item_is_refused(make_tokenizer: Any, item: Any, message: str) -> None:
    with pytest.raises(ItemError, match=message):
        _encoder(make_tokenizer).encode(item)
