"""Find trunks whose output for a text depends on its batch: split their batches by length, or refuse them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

# Padding changes the hidden states of other tokens: through convolutions (convbert, canine), a Fourier transform of the
# row (fnet), landmarks and hashes of the row (nystromformer, yoso), neighbours' embeddings (mobilebert), or positions
# (cpmant).
_UNPADDED = frozenset({"canine", "convbert", "cpmant", "fnet", "mobilebert", "nystromformer", "yoso"})
# Releases of transformers before 5.24, the one that was tried, let padding change these too (seen with 5.2 and 5.4).
if Version(transformers.__version__) < Version("5.24"):
    _UNPADDED |= {"deepseek_v3", "doge", "glm4_moe_lite", "youtu"}


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError for a trunk whose hidden states of a text depend on texts in the same or an earlier batch."""
    reason = None
    if config.model_type == "big_bird" and getattr(config, "attention_type", "") == "block_sparse":
        reason = (
            "its block-sparse attention becomes full attention at the first short text; set attention_type to "
            "original_full in its config.json"
        )
    elif config.model_type == "ibert" and getattr(config, "quant_mode", False):
        reason = "it scales activations by the whole batch; set quant_mode to false in its config.json"
    if reason is not None:
        raise ValueError(
            "EnsembleRewardConfig: text_config: expected a trunk whose output for a text does not depend on other "
            f"texts, got {config.model_type!r}: {reason}"
        )


def is_unpadded(config: PreTrainedConfig) -> bool:
    """Whether padding changes the hidden states of other tokens, so that every row needs a batch without any."""
    return config.model_type in _UNPADDED


def follows_length(config: PreTrainedConfig) -> bool:
    """Whether a row's output depends on the length of its batch, so that `length_classes` must split the batch."""
    return is_unpadded(config) or any(_scales(rope) for rope in _ropes(config))


def switch_length(config: PreTrainedConfig) -> int | None:
    """The longest row with the same rotary frequencies as every shorter one; None if the frequencies never change."""
    switches = [_switch(config, rope) for rope in _ropes(config) if _scales(rope)]
    return min(switches, default=None)


def length_classes(config: PreTrainedConfig, lengths: Sequence[int]) -> list[list[int]]:
    """Group the rows that can share a forward pass, so that each has the output that it has alone.

    Families that must see no padding: one group per length. Rotary frequencies of type longrope: one group up to the
    original length, one beyond it. Type dynamic: one group up to max_position_embeddings, one per length beyond it.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        key = [length] if is_unpadded(config) else []
        for rope in _ropes(config):
            if _scales(rope):
                beyond = length > _switch(config, rope)
                key.append(length if beyond and rope["rope_type"] != "longrope" else int(beyond))
        groups.setdefault(tuple(key), []).append(row)
    return list(groups.values())


def reset_frequencies(trunk: Any) -> None:
    """Restore the initial rotary frequencies of type dynamic, which would keep those of the longest row seen so far."""
    if not any("dynamic" in rope["rope_type"] for rope in _ropes(trunk.config)):
        return
    for module in trunk.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            original, current = (getattr(module, prefix + which, None) for which in ("original_inv_freq", "inv_freq"))
            setattr(module, name, module.original_max_seq_len)
            if original is not None and current is not None:
                setattr(module, f"{prefix}inv_freq", original.to(current.device, copy=True))


def _scales(rope: dict[str, Any]) -> bool:
    return "dynamic" in rope["rope_type"] or rope["rope_type"] == "longrope"


def _switch(config: PreTrainedConfig, rope: dict[str, Any]) -> int:
    longest = int(config.max_position_embeddings)
    return int(rope.get("original_max_position_embeddings") or longest) if rope["rope_type"] == "longrope" else longest


def _ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary settings of a configuration: one, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in [rope] if "rope_type" in rope else rope.values():
        if isinstance(settings, dict) and isinstance(settings.get("rope_type"), str):
            yield settings
