"""Find out which kind of reward a source is, and load its heads or its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from ....engine import EnsembleHead, EnsembleRewardConfig, Scorer
from ....engine.config import max_positions
from ....engine.own_code import refusing_own_code
from ....engine.taps import num_layers, parse_taps, reads_response
from ....engine.text import ItemEncoder
from ....kernels import Aggregation
from ...job.files import refuse_mistyped
from ...models.adapter import adapter_settings, is_reward_adapter, load_head
from ...models.causal_lm import causal_lm
from ...models.loading import LoadedReward, load_reward, load_tokenizer, model_folder
from ...reward.region import of_heads
from ..config import Kind, RewardConfig, kind_by_name
from ..policy.policy import RewardOnTrunk
from .reading import HeadEncoder

_SAMPLE = 4096  # elements compared of each tensor: a trained trunk differs in every matrix
_BATCH_TOKENS = 8192  # of a reward model, padding included


class Resolved(NamedTuple):
    """A reward's source, with its kind and what was loaded from it.

    kind      see `RewardConfig`
    on_trunk  kinds shared and adapter: heads for the policy's trunk, frozen, with the config's aggregation
    scorer    kind model: the reward model on its device, with its own tokeniser
    """

    kind: Kind
    on_trunk: RewardOnTrunk | None = None
    scorer: Scorer | None = None

    @property
    def num_heads(self) -> int | None:
        """K; None for a function or a server, which may or may not have heads."""
        if self.on_trunk is not None:
            return self.on_trunk.head.num_heads
        return None if self.scorer is None else int(self.scorer.model.score.num_heads)

    @property
    def measures_distance(self) -> bool:
        """Whether the reward has a trust region; a function or a server has none."""
        if self.on_trunk is not None:
            return self.on_trunk.head.trust is not None
        return self.scorer is not None and self.scorer.model.score.trust is not None

    def __str__(self) -> str:
        """The kind, and how heads become a reward."""
        if self.on_trunk is None and self.scorer is None:
            return self.kind
        head: EnsembleHead = self.on_trunk.head if self.on_trunk else self.scorer.model.score  # type: ignore[union-attr]
        spec = head.aggregation
        if head.num_heads == 1:
            return f"{self.kind}, one head" + (f", {spec}" if spec.trust is not None else "")
        how = "of the heads' means"
        if spec.source == "sample" and spec.kind != "nominal":
            how = "of sampled heads, with noise by seed and step; source=mean takes the means"
        return f"{self.kind}, {spec} {how}"


def resolve_reward(config: RewardConfig, policy: Any, device: torch.device | str) -> Resolved:
    """Determine the reward's kind, by `config.kind` or by its files, and load it; weights are read once.

    For kind adapter the source is adapter/, which `prudent train` with mode lora saves, or the run folder that has it.

    Args:
        config: aggregation "" means the heads' own; for one head it is always mean, less a price of distance that the
            config or else the model asks for.
        policy: the causal language model to train, as loaded.
        device: of a reward model with its own trunk.

    Raises:
        ValueError: for a source of no known kind, or of another kind than `config.kind`; for heads that cannot be read,
            or that do not read the last token of a shared trunk; for a price of distance without a trust region; for
            append_eos with another kind than model.
    """
    resolved = _resolved(config, policy, device)
    if config.append_eos is not None and resolved.kind != "model":
        raise ValueError(
            f"reward.append_eos: expected null with kind {resolved.kind} (only kind model reads it), "
            f"got {config.append_eos}"
        )
    return resolved


def _resolved(config: RewardConfig, policy: Any, device: torch.device | str) -> Resolved:
    source, kind = config.source, kind_by_name(config)
    if kind in ("callable", "http"):
        return Resolved(kind)
    adapter = _adapter_folder(source) if kind in (None, "adapter") else None
    if adapter is not None:
        head = _aggregated(_read_head(adapter), config.aggregation)
        return Resolved("adapter", RewardOnTrunk(head, adapter, adapter_settings(adapter).get("taps")))
    if kind == "adapter":
        raise ValueError(
            "reward.source: expected a folder with a LoRA and heads, as `prudent train` with mode lora saves in "
            f"adapter/, got {source}"
        )
    if kind == "model":
        return Resolved("model", scorer=_scorer(config, _load(config), device))
    trunk = causal_lm(policy).base_model
    loaded, difference = None, _other_shape(_config(model_folder(source)), trunk.config)
    if difference is None:
        loaded = _load(config)
        differs = _first_difference(loaded.model.model.state_dict(), trunk.state_dict())
        if differs is None and loaded.model.config.reads_logprob:
            ours = loaded.model.lm_head or loaded.model.get_input_embeddings()
            theirs = causal_lm(policy).get_output_embeddings()
            differs = _first_difference({"lm_head": ours.weight}, {"lm_head": theirs.weight})
        if differs is None:
            head = _aggregated(loaded.model.score, config.aggregation)
            read = loaded.model.config
            return Resolved("shared", RewardOnTrunk(head, taps=read.taps, skips=read.logprob_skips or ()))
        difference = f"whose trunk has another {differs} than the policy"
    if kind == "shared":
        raise ValueError(
            f"reward.source: expected an EnsembleRewardModel on the policy's own trunk with kind shared, got {source}, "
            f"{difference}; reward.kind=model loads it with its own trunk"
        )
    return Resolved("model", scorer=_scorer(config, _load(config) if loaded is None else loaded, device))


def open_encoder(source: str | Path, policy: Any) -> HeadEncoder:
    """Open the encoder of a reward on the policy's trunk: its own tokeniser, template, EOS rule and length.

    Args:
        source: of a reward of kind shared or adapter.
        policy: the causal language model.
    """
    adapter = _adapter_folder(source)
    folder = str(adapter or model_folder(source))
    settings: Any = adapter_settings(adapter) if adapter else vars(_config(folder))
    trunk, taps = causal_lm(policy), settings.get("taps")
    limits = (settings.get("max_score_length"), max_positions(trunk.config.get_text_config()))
    encoder = ItemEncoder(
        load_tokenizer("reward.source", folder),
        append_eos=settings.get("append_eos", True),
        max_length=min((n for n in limits if n is not None), default=None),
        vocab_size=trunk.get_input_embeddings().num_embeddings,
        finds_response=bool(taps) and reads_response(parse_taps(taps, num_layers(trunk))),
    )
    return HeadEncoder(encoder, settings.get("skip_token_id"))


def _adapter_folder(source: str | Path) -> Path | None:
    return next((f for f in (Path(source), Path(source) / "adapter") if is_reward_adapter(f)), None)


def _read_head(folder: Path) -> EnsembleHead:
    try:
        return load_head(folder)
    except ValueError as error:
        raise ValueError(f"reward.source: {error}") from error


def _aggregated(head: EnsembleHead, aggregation: str) -> EnsembleHead:
    try:
        spec = Aggregation.parse(aggregation or head.aggregation)
        if head.num_heads == 1:
            priced = spec if spec.trust is not None else head.aggregation
            spec = replace(of_heads(priced, 1), source="mean")  # Bradley-Terry trains no std to sample with
        head.aggregation = spec.with_centre("none")  # the loop centres, over all of a step's samples
        head.check_price(head.aggregation)
    except ValueError as error:
        raise ValueError(f"reward.{error}") from None
    return head.requires_grad_(False).eval()


def _config(source: str) -> Any:
    refuse_mistyped("reward.source", source)
    try:
        with refusing_own_code(source):
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            "reward.source: expected a reward model's folder or hub name, an adapter's folder, MODULE:FUNCTION, "
            f"FILE.py:FUNCTION or a URL, got {source!r}: {reason}"
        ) from None


def _load(config: RewardConfig) -> LoadedReward:
    return load_reward("reward.source", config.source, append_eos=config.append_eos)


def _scorer(config: RewardConfig, loaded: LoadedReward, device: torch.device | str) -> Scorer:
    """Move a loaded reward model to `device`, with the config's aggregation and its own tokeniser."""
    _aggregated(loaded.model.score, config.aggregation)
    model: Any = loaded.model.requires_grad_(False)
    return Scorer(model.to(device), loaded.tokenizer, batch_tokens=_BATCH_TOKENS, progress=False)


def _other_shape(reward: Any, policy: Any) -> str | None:
    """Why heads with the configuration `reward` cannot read a trunk with the configuration `policy`; None: they can."""
    if not isinstance(reward, EnsembleRewardConfig):
        return "which is not an EnsembleRewardModel"
    if reward.pooling != "last":
        return f"whose pooling is {reward.pooling}, not last"
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        theirs, ours = getattr(reward.text_config, name, None), getattr(policy, name, None)
        if theirs != ours:
            return f"whose trunk has {name} {theirs} where the policy has {ours}"
    return None


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
