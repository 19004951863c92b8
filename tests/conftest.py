"""Fixtures for every test: shared data if present, and uninitialised memory that is poisoned with NaN."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a model hub is a broken test

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real data and a small real model beside the checkout; a user's machine has none, and the test
    skips.
    """
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the folder `shared` (real data and a small model) is not beside the checkout")
    return folder


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("prudent.") and result.device.type != "meta" and type(result) is torch.Tensor:
            result.fill_(float("nan") if result.dtype.is_floating_point else -(2**30))
        return result

    return wrapper


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like, empty_strided and Tensor.new_empty called from prudent return NaN.

    After flash-linear-attention's conftest: an op that forgets to write part of an output fails, instead of passing
    because the memory happened to hold zeros.
    """
    with torch.device("cpu"):
        # torch notes once, at the first call under such a context, which functions make tensors: were these ours, then
        # its own `empty` would make real tensors under torch.device("meta") for the rest of the process
        torch.empty(0)
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


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
