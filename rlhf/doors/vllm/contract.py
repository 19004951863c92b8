"""What the plugin promises, without vLLM: which models can be served, the names of their weights, and the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ....engine import EnsembleHead, EnsembleRewardConfig
from ....engine.config import is_encoder
from ....engine.families import switch_length
from ....kernels import Aggregation, EnsembleOutput

HEAD, TRUNK, LM_HEAD = "score.", "model.", "lm_head.weight"  # in a checkpoint of `EnsembleRewardModel`
_INSTEAD = "serve it with `prudent serve`"


def check_servable(config: EnsembleRewardConfig, max_model_len: int) -> None:
    """Raise ValueError, in one sentence that says what to do instead, for a model whose rewards vLLM would change.

    Args:
        config: of the model.
        max_model_len: vLLM's limit of tokens in a sequence.
    """
    trunk = config.text_config
    family = trunk.model_type
    if config.pooling != "last" or is_encoder(trunk):
        _refuse("a decoder whose heads read the last token", f"the encoder {family!r}", _INSTEAD)
    if getattr(trunk, "use_bidirectional_attention", False) or getattr(trunk, "is_causal", True) is False:
        _refuse("a decoder with causal attention", f"a bidirectional {family!r}", _INSTEAD)
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        _refuse("the trunk of a causal language model", repr(family), _INSTEAD)
    if Aggregation.parse(config.aggregation).of_batch:
        _refuse(
            "an aggregation that scores each text alone",
            repr(config.aggregation),
            """name another, such as --hf-overrides '{"aggregation": "tradeoff:0.4"}'""",
        )
    switch = switch_length(trunk)
    if switch is not None and max_model_len > switch:
        _refuse(
            f"max_model_len of at most {switch}",
            f"{max_model_len}, at which vLLM gives a short text the rotary frequencies of a long one",
            f"start vLLM with --max-model-len {switch}",
        )


def refuse_family(architecture: str, reason: str) -> None:
    """Raise ValueError for a trunk that vLLM cannot run inside another model."""
    _refuse("a trunk that vLLM can run in another model", f"{architecture}, {reason}", _INSTEAD)


def _refuse(expected: str, got: str, instead: str) -> None:
    raise ValueError(f"EnsembleRewardModel in vLLM: expected {expected}, got {got}: {instead}")


def causal_class(config: EnsembleRewardConfig) -> str:
    """The name of the trunk's causal language model class, by which vLLM knows the family."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type])


def causal_prefix(config: EnsembleRewardConfig) -> str:
    """What the trunk's tensors begin with in a checkpoint of its causal language model: "model.", "transformer."."""
    kind: Any = AutoModelForCausalLM._model_mapping[type(config.text_config)]  # type: ignore[attr-defined]
    return f"{(kind[0] if isinstance(kind, tuple) else kind).base_model_prefix}."


def new_head(config: EnsembleRewardConfig) -> EnsembleHead:
    """A frozen head of the model's sizes, whose reward does not depend on the other rows of a batch."""
    spec = Aggregation.parse(config.aggregation).with_centre("none")
    return EnsembleHead(
        config.feature_size,
        config.num_heads,
        aggregation=spec,
        std_floor=config.std_floor,
        trust_directions=config.trust_directions,
    ).requires_grad_(False)


def split_weights(
    weights: Iterable[tuple[str, Tensor]], head: dict[str, Tensor], prefix: str, lm_head: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the trunk's tensors, named as in a checkpoint of its causal language model; keep the others.

    Args:
        weights: (name, tensor) of a checkpoint of `EnsembleRewardModel`.
        head: gets the state of the head, copied, because loaders reuse their memory.
        prefix: see `causal_prefix`.
        lm_head: [V, D], gets the language-model head, or the embeddings if the checkpoint has no head of its own.

    Raises:
        ValueError: for another tensor, or if `lm_head` is given and the checkpoint has nothing for it.
    """
    filled = lm_head is None
    own = False
    for name, tensor in weights:
        if name.startswith(HEAD):
            head[name.removeprefix(HEAD)] = tensor.clone()
            continue
        is_own = name == LM_HEAD and lm_head is not None
        if lm_head is not None and (is_own or (name.endswith(".embed_tokens.weight") and not own)):
            lm_head.copy_(tensor)
            filled, own = True, is_own
        if name.startswith(TRUNK):
            yield prefix + name.removeprefix(TRUNK), tensor
        elif not is_own:
            raise ValueError(f"EnsembleRewardModel in vLLM: expected tensors {TRUNK}* and {HEAD}*, got {name}")
    if not filled:
        raise ValueError(f"EnsembleRewardModel in vLLM: expected {LM_HEAD} or embed_tokens.weight, got none")


def load_head(head: EnsembleHead, state: Mapping[str, Tensor]) -> set[str]:
    """Copy the state of a head into `head`; return the names as in the checkpoint.

    Raises:
        ValueError: for a state that lacks a tensor or has one of another shape.
    """
    wanted = head.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        shapes = [list(store[name].shape) if name in store else "none" for store in (wanted, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"EnsembleRewardModel in vLLM: {HEAD}{name}: expected {shapes[0]}, got {shapes[1]}")
    head.load_state_dict(state)
    return {f"{HEAD}{name}" for name in state}


def vectors(output: EnsembleOutput) -> Tensor:
    """[N, 2K + 1], or [N, 2K + 2] with a trust region, fp32: means, stds, the distance if measured, the reward.

    The reward is the last: that is what verl reads. The heads' numbers come first, so that an odd length tells that no
    distance is measured (`vector_dialects.scores_of_vector`).
    """
    distance = [] if output.distance is None else [output.distance[:, None]]
    return torch.cat([output.mean, output.std, *distance, output.reward[:, None]], dim=1)


def without_skipped(ids: list[int], skipped: int | None) -> list[int]:
    """`ids` without those equal to `skipped` at their end, at least the first.

    Heads with `config.skip_token_id` read the last other token, whose hidden state no later token changes.
    """
    end = len(ids)
    while end > 1 and ids[end - 1] == skipped:
        end -= 1
    return ids[:end]
