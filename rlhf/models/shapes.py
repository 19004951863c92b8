"""Model configurations by name, to plan memory without weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from ...engine.own_code import refusing_own_code
from ..job.files import refuse_mistyped

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "rope_theta": 500000.0, "vocab_size": 128256}
_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0, "vocab_size": 152064}


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied,
    }  # fmt: skip


# values of the models' config.json
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-1b": {**_LLAMA, **_sizes(2048, 8192, 16, 32, 8, tied=True)},
    "llama3-3b": {**_LLAMA, **_sizes(3072, 8192, 28, 24, 8, tied=True)},
    "llama3-8b": {**_LLAMA, **_sizes(4096, 14336, 32, 32, 8)},
    "llama3-70b": {**_LLAMA, **_sizes(8192, 28672, 80, 64, 8)},
    "qwen2.5-0.5b": {**_QWEN, "vocab_size": 151936, **_sizes(896, 4864, 24, 14, 2, tied=True)},
    "qwen2.5-1.5b": {**_QWEN, "vocab_size": 151936, **_sizes(1536, 8960, 28, 12, 2, tied=True)},
    "qwen2.5-7b": {**_QWEN, **_sizes(3584, 18944, 28, 28, 4)},
    "qwen2.5-14b": {**_QWEN, **_sizes(5120, 13824, 48, 40, 8)},
    "qwen2.5-32b": {**_QWEN, **_sizes(5120, 27648, 64, 40, 8)},
    "smollm2-135m": {
        "model_type": "llama", "max_position_embeddings": 8192, "vocab_size": 49152,
        **_sizes(576, 1536, 30, 9, 3, tied=True),
    },
}  # fmt: skip


def model_config(name: str, key: str = "model") -> Any:
    """Return the transformers config of a built-in shape, a config.json, a model's folder or a hub name.

    key: the config key that errors name.

    Raises:
        ValueError: if `name` is none of these.
    """
    if name.lower() in SHAPES:
        fields = dict(SHAPES[name.lower()])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    refuse_mistyped(key, name)
    try:
        with refusing_own_code(name):
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}: expected {', '.join(SHAPES)}, a config.json, a folder or a hub name, got {name!r} ({first})"
        ) from None
