"""A causal language model that says sentiment words, and its tokeniser: tiny, built and not fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_WORDS = (
    "the a it was is and but very not my your day food hotel train film soup room people service good great happy love "
    "lovely excellent nice fine bad awful terrible sad hate horrible poor boring ugly pain calm blue long short loud"
)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 layers, width 32, grouped keys) and a word tokeniser with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *_WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = _TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=3,
        bos_token_id=None,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from uniform: the samples differ from prompt to prompt
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_chat")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
