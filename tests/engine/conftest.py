"""Tiny trunks of every family with random weights, and a byte-level tokeniser built on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 300
_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_DECODER = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_ENCODER = {**_COMMON, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _DECODER),
    "qwen2": ("Qwen2Config", _DECODER),
    "qwen3": ("Qwen3Config", _DECODER),
    "mistral": ("MistralConfig", {**_DECODER, "sliding_window": 6}),
    "gemma": ("GemmaConfig", _DECODER),
    "gemma2": ("Gemma2Config", {**_DECODER, "sliding_window": 6}),
    "gemma3": ("Gemma3TextConfig", {**_DECODER, "sliding_window": 6}),
    "gpt_neox": ("GPTNeoXConfig", _ENCODER),
    "gpt2": ("GPT2Config", {**{k: _COMMON[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
                            "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "cohere": ("CohereConfig", {**_DECODER, "logit_scale": 0.25}),
    "bert": ("BertConfig", _ENCODER),
    "roberta": ("RobertaConfig", {**_ENCODER, "pad_token_id": 1, "bos_token_id": 0}),
    "deberta": ("DebertaV2Config", {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "modernbert": ("ModernBertConfig", {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """family, **changes -> configuration of a tiny trunk."""

    def build(family: str, **changes: Any) -> Any:
        name, fields = FAMILIES[family]
        return getattr(transformers, name)(**{**fields, **changes})

    return build


@pytest.fixture
def tiny_trunk(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """family, seed, **changes -> a tiny trunk in eval mode."""

    def build(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return transformers.AutoModel.from_config(tiny_config(family, **changes)).eval()

    return build


@pytest.fixture
def causal_lm(tiny_config: Callable[..., Any]) -> Any:
    """A tiny Llama with its language-model head."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config("llama")).eval()


@pytest.fixture
def make_classifier(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """family, num_labels, **changes -> a tiny sequence classifier in eval mode."""

    def build(family: str = "llama", num_labels: int = 1, **changes: Any) -> Any:
        torch.manual_seed(0)
        config = tiny_config(family, num_labels=num_labels, **changes)
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        for parameter in model.parameters():  # initial weights are so small that many a wrong reward would look right
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return build


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A tokeniser of single bytes; special tokens as asked."""

    def build(chat: bool = False, **special: str) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<|end|>", *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {"pad_token": "<pad>", "eos_token": "</s>", **special}
        special = {name: token for name, token in special.items() if token}
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        if chat:
            fast.chat_template = CHAT_TEMPLATE
        return fast

    return build
