"""Where rewards come from: which kind a source is, and the heads that read the policy's own trunk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from ....engine import EnsembleHead, EnsembleRewardConfig, EnsembleRewardModel
from ....engine.text import ItemEncoder
from ...job.files import refuse_mistyped
from ...models.adapter import appends_eos, is_reward_adapter, load_head
from ...models.causal_lm import causal_lm, has_values
from ...models.loading import load_reward_model, load_tokenizer, model_folder
from ...sampling.prompts import Prompt
from ..config import Kind, PPOConfig, RewardConfig, kind_by_name
from .sources import CallableReward, HTTPReward, ModelReward, Rewards, RewardSource, Texts, VaderReward

__all__ = [
    "Resolved",
    "RewardSource",
    "Rewards",
    "check_reading",
    "open_gold",
    "open_reward",
    "resolve_reward",
]

_SAMPLE = 4096  # elements of each tensor that are compared: a trunk that was trained differs in every matrix


class Resolved(NamedTuple):
    """What a reward's source turned out to be, and what of it the policy's trunk carries.

    kind      see `RewardConfig`
    head      of kind shared and adapter: the heads, frozen, with the config's aggregation
    adapter   of kind adapter: the LoRA's folder
    """

    kind: Kind
    head: EnsembleHead | None = None
    adapter: Path | None = None


def resolve_reward(config: RewardConfig, policy: Any) -> Resolved:
    """The kind that `config.kind` says, or that `auto` stands for, and the heads of one on the policy's trunk.

    Of kind adapter is what `prudent train` with mode lora saved: adapter/, or the run that holds it. A model whose
    trunk is compared with the policy's is read once.

    Args:
        config: aggregation "" takes the heads' own; of one head it is always mean.
        policy: the causal language model that the rewards are for, as loaded.

    Raises:
        ValueError: for a source that is of none of the kinds, or not of the one asked for; for heads that cannot be
            read, or do not read the last token of a shared trunk.
    """
    source, kind = config.source, kind_by_name(config)
    folder = _adapter_folder(source) if kind in (None, "adapter") else None
    if folder is not None:
        return Resolved("adapter", _aggregated(_read_head(folder), config.aggregation), folder)
    if kind == "adapter":
        raise ValueError(
            "reward.source: expected a folder with a LoRA and heads, as `prudent train` with mode lora saves in "
            f"adapter/, got {source}"
        )
    if kind not in (None, "shared"):
        return Resolved(kind)
    reason, head = _why_not_shared(source, policy)
    if head is not None:
        return Resolved("shared", _aggregated(head, config.aggregation))
    if kind == "shared":
        raise ValueError(
            f"reward.source: expected an EnsembleRewardModel on the policy's own trunk with kind shared, got {source}, "
            f"{reason}; reward.kind=model takes it, with a trunk of its own"
        )
    return Resolved("model")


def check_reading(source: str | Path, tokenizer: Any, policy: Any) -> None:
    """Refuse a reward on the policy's trunk that was trained on other tokens than the policy will give it.

    The reward's own tokeniser and EOS rule encode two short sequences (as `Scorer` does), the policy's tokeniser the
    prompt and `rollout.Turn` what closes the response: the ids must be the same.

    Args:
        source: of a reward of kind shared or adapter.
        tokenizer: the policy's.
        policy: the causal language model.

    Raises:
        ValueError: for ids that differ.
    """
    folder = str(_adapter_folder(source) or model_folder(source))
    theirs = load_tokenizer("reward.source", folder)
    if _adapter_folder(source) is None:
        config = _config(folder)
        append_eos = config.append_eos if isinstance(config, EnsembleRewardConfig) else True
    else:
        append_eos = appends_eos(folder)
    size = causal_lm(policy).get_input_embeddings().num_embeddings
    encoders = [
        ItemEncoder(t, append_eos=a, max_length=None, vocab_size=size)
        for t, a in ((theirs, append_eos), (tokenizer, True))
    ]
    for text in ("How was it?", "One day, 2 cats sat."):
        item = {"prompt": text, "response": " It was fine."}
        read, trained = (encoder.encode(item)[0] for encoder in reversed(encoders))
        if read != trained:
            raise ValueError(
                f"reward.source: expected a reward trained on the tokens that the policy reads, got {source}, which "
                f"reads {trained[-8:]} at the end where the policy reads {read[-8:]} (another tokeniser, chat template "
                "or append_eos); reward.kind=model takes it, with a trunk and tokeniser of its own"
            )


def open_reward(
    config: PPOConfig, tokenizer: Any, prompts: Sequence[Prompt], device: torch.device | str, kind: Kind
) -> RewardSource:
    """The source of a reward of kind model, callable or http (shared and adapter live in the policy).

    Args:
        config: reward.
        tokenizer: the policy's, which makes texts of responses.
        prompts: those that `Samples.prompt_index` will number.
        device: where a reward model goes.
        kind: from `resolve_reward`.

    Raises:
        ValueError: for a source that cannot be loaded, or a reward model that cannot read the prompts.
    """
    reward, texts = config.reward, Texts(tokenizer, prompts)
    if kind == "http":
        return HTTPReward(reward.source, texts, timeout=reward.timeout)
    if kind == "callable":
        return VaderReward(texts) if reward.source == "vader" else CallableReward("reward.source", reward.source, texts)
    if kind == "model":
        return ModelReward(model_folder(reward.source), texts, device, reward.aggregation)
    raise ValueError(f"reward.kind: expected model, callable or http, got {kind}, whose heads the policy holds")


def open_gold(name: str, tokenizer: Any, prompts: Sequence[Prompt]) -> RewardSource:
    """A gold scorer: vader, MODULE:FUNCTION, FILE.py:FUNCTION or a URL. ValueError for anything else."""
    texts = Texts(tokenizer, prompts)
    if name == "vader":
        return VaderReward(texts)
    if name.startswith(("http://", "https://")):
        return HTTPReward(name, texts, key="gold")
    return CallableReward("gold", name, texts)


def _adapter_folder(source: str | Path) -> Path | None:
    return next((f for f in (Path(source), Path(source) / "adapter") if is_reward_adapter(f)), None)


def _read_head(folder: Path) -> EnsembleHead:
    try:
        return load_head(folder)
    except ValueError as error:
        raise ValueError(f"reward.source: {error}") from error


def _aggregated(head: EnsembleHead, aggregation: str) -> EnsembleHead:
    if head.num_heads == 1:
        head.aggregation = "mean"
    elif aggregation:
        try:
            head.aggregation = aggregation
        except ValueError as error:
            raise ValueError(f"reward.{error}") from None
    head.aggregation = head.aggregation.with_centre("none")  # centring is the loop's, over all of a step's samples
    return head.requires_grad_(False).eval()


def _config(source: str) -> Any:
    refuse_mistyped("reward.source", source)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            "reward.source: expected a reward model's folder or hub name, an adapter's folder, MODULE:FUNCTION, "
            f"FILE.py:FUNCTION or a URL, got {source!r}: {reason}"
        ) from None


def _why_not_shared(source: str, policy: Any) -> tuple[str | None, EnsembleHead | None]:
    """(why the heads in `source` cannot read the policy's trunk, None) or (None, the heads)."""
    source = model_folder(source)
    config = _config(source)
    if not isinstance(config, EnsembleRewardConfig):
        return "which is no EnsembleRewardModel", None
    if config.pooling != "last":
        return f"whose pooling is {config.pooling}, not last", None
    trunk = causal_lm(policy).base_model
    theirs, ours = config.text_config, trunk.config
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        one, other = getattr(theirs, name, None), getattr(ours, name, None)
        if one != other:
            return f"whose trunk has {name} {one} where the policy has {other}", None
    if not has_values(trunk.get_input_embeddings().weight):
        return None, EnsembleRewardModel(config).score  # shapes are all there is
    loaded: Any = load_reward_model("reward.source", source)
    differs = _first_difference(loaded.model.state_dict(), trunk.state_dict())
    if differs is not None:
        return f"whose trunk has another {differs} than the policy", None
    head: EnsembleHead = loaded.score
    return None, head


def _first_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The first tensor whose samples differ, each in the coarser of its two precisions."""
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if a is None or b is None or a.shape != b.shape:
            return name
        step = max(1, a.numel() // _SAMPLE)
        a, b = (tensor.detach().reshape(-1)[::step].cpu() for tensor in (a, b))
        dtype = min((a.dtype, b.dtype), key=lambda d: torch.finfo(d).bits if d.is_floating_point else 0)
        if not torch.equal(a.to(dtype), b.to(dtype)):
            return name
    return None
