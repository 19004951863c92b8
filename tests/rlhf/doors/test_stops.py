"""The tokens that end a response: EOS, padding, the template's closing, and the generation config's."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, GenerationConfig

from prudent.rlhf.doors.stops import Stops, policy_stops

END, USER, LONG = 3, 1, 45


@pytest.fixture
def tokenizer(tiny_chat_folder):
    return AutoTokenizer.from_pretrained(tiny_chat_folder)


def test_eos_and_the_templates_closing_end_a_response_and_other_special_tokens_do_not(tokenizer):
    assert Stops(tokenizer).ids == {END}
    tokenizer.eos_token = "<unk>"
    stops = Stops(tokenizer)
    assert stops.ids == {END, 0}
    assert stops.complete([7, END])
    assert not stops.complete([7, USER])
    assert not stops.complete([])


def test_a_folders_generation_config_is_read_too(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert policy_stops(tmp_path).ids == {END}
    GenerationConfig(eos_token_id=[END, LONG]).save_pretrained(tmp_path)
    assert policy_stops(str(tmp_path)).ids == {END, LONG}


def test_a_closing_of_plain_text_and_a_template_that_fails_add_nothing(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    assert Stops(tokenizer).ids == {END}
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert Stops(tokenizer).ids == {END}


def test_a_processor_has_its_tokenisers_stops(tokenizer):
    class Processor:
        pass

    processor = Processor()
    processor.tokenizer = tokenizer
    assert policy_stops(processor).ids == {END}
