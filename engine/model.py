"""`EnsembleRewardModel`: a Hugging Face trunk and an `EnsembleHead`, in the shape that trainers take as it is."""

from __future__ import annotations

import inspect
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from ..kernels import Aggregation
from .config import EnsembleRewardConfig, is_encoder, max_positions, position_offset
from .convert import _HUB_OPTIONS, _check_labels, _linear_head, _refuse_options, load_trunk
from .eval_mode import evaluating
from .head import EnsembleHead
from .weights import reading_weights, refuse_missing


@dataclass
class EnsembleRewardOutput(ModelOutput):
    """What `EnsembleRewardModel` returns for B sequences and K heads, all fp32.

    loss    None: the losses live with the training jobs; here for trainers that look
    logits  [B, 1]  the aggregated reward
    mean    [B, K]  the heads' means, calibrated
    std     [B, K]  the heads' standard deviations, calibrated, > 0
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None


class EnsembleRewardModel(PreTrainedModel):
    """A reward model that knows when it does not know: one trunk (`.model`), K Gaussian heads (`.score`).

    Works wherever a `...ForSequenceClassification` with `num_labels=1` works: `logits` is [B, 1]. The reward is read at
    the last attended token (`config.pooling`), found from the attention mask and never from the padding token; left and
    right padding score alike, because positions are counted over attended tokens. The head computes in fp32 with
    autocast off and stays fp32 in memory and on disk when the trunk is in a half precision.

    Make one with `from_trunk`, `from_sequence_classifier` or `from_pretrained`. Importing `prudent.engine` registers
    the class with transformers' Auto classes, so that `AutoModelForSequenceClassification.from_pretrained(folder)` and
    trainers that take a path find it. In TRL: `GRPOTrainer(reward_funcs=model, reward_processing_classes=tokenizer)`.
    Trainers neither truncate for a reward model nor put it in eval mode; what is too long is warned of here, and a
    trunk with dropout should be in eval mode.

    Args:
        config: with `text_config` set.
        trunk: an existing trunk, used by reference; None builds one from `config.text_config` with random weights.
        head: an existing head, used by reference; None builds a fresh one.
    """

    config: EnsembleRewardConfig
    config_class = EnsembleRewardConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # what the trunk itself does not support, its own constructor refuses
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"score"}  # noqa: RUF012  as transformers reads it

    def __init__(
        self, config: EnsembleRewardConfig, trunk: PreTrainedModel | None = None, head: EnsembleHead | None = None
    ) -> None:
        if config.text_config is None:
            raise ValueError("EnsembleRewardModel: config.text_config: expected the trunk's configuration, got None")
        super().__init__(config)
        self.model: Any = AutoModel.from_config(config.text_config) if trunk is None else trunk
        if config.pooling == "pooler" and getattr(self.model, "pooler", None) is None:
            raise ValueError(
                f"EnsembleRewardModel: pooling: expected last or first, because {type(self.model).__name__} has no "
                "pooler, got 'pooler'"
            )
        self.score = head or EnsembleHead(
            config.hidden_size, config.num_heads, aggregation=config.aggregation, std_floor=config.std_floor
        )
        for given in (trunk, head):
            # post_init draws weights for every module without this mark, adapters inside a given trunk included
            for module in () if given is None else given.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        # a trunk without them (ALiBi) counts from the mask itself
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EnsembleHead):
            fresh = EnsembleHead(module.hidden_size, module.num_heads, device=module.weight.device)
            for name, value in fresh.state_dict().items():
                init.copy_(getattr(module, name), value)  # leaves alone what a checkpoint has filled
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`; a checkpoint that lacks a tensor is refused, not filled at random.

        Raises:
            ValueError: naming the missing tensors, or the folder whose weights cannot be read.
        """
        name = args[0] if args else ""
        with reading_weights(name):
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        refuse_missing("EnsembleRewardModel.from_pretrained", name, info["missing_keys"])
        return (model, info) if output_loading_info else model

    @classmethod
    def from_trunk(
        cls,
        trunk: str | os.PathLike[str] | PreTrainedModel,
        *,
        num_heads: int | None = None,
        aggregation: str | Aggregation | None = None,
        head: EnsembleHead | None = None,
        std_floor: float | None = None,
        pooling: str | None = None,
        append_eos: bool | None = None,
        max_score_length: int | None = None,
        **kwargs: Any,
    ) -> EnsembleRewardModel:
        """Heads on a trunk: a fresh ensemble (K = 5, `tradeoff:0.4`), or a trained one.

        Args:
            trunk: a folder or hub name of any model that AutoModel loads, or a `PreTrainedModel`, used by reference
                and not copied, with its mode and its config: of a causal language model the inner base model is taken,
                which may so be shared with a rollout policy.
            num_heads: K; 5 where neither it nor `head` is given.
            aggregation: the head's; None takes `head`'s own, else `tradeoff:0.4`.
            head: a trained `EnsembleHead`, used by reference and moved to the trunk's device.
            std_floor: of a fresh head.
            pooling, append_eos, max_score_length: see `EnsembleRewardConfig`.
            kwargs: to `AutoModel.from_pretrained` (dtype, device_map, attn_implementation, ...); with a name only.

        Raises:
            ValueError: for a trunk that is no language model or lacks tensors, or a head that does not fit.
        """
        body = load_trunk(trunk, kwargs, need_pooler=pooling == "pooler")
        if head is None:
            options: dict[str, Any] = {} if std_floor is None else {"std_floor": std_floor}
            head = EnsembleHead(
                body.config.hidden_size,
                5 if num_heads is None else num_heads,
                aggregation=aggregation or "tradeoff:0.4",
                **options,
            )
        else:
            _check_head(head, body.config.hidden_size, num_heads, std_floor)
            if aggregation is not None:
                head.aggregation = aggregation
        config = EnsembleRewardConfig(
            text_config=body.config,
            num_heads=head.num_heads,
            aggregation=head.aggregation,
            std_floor=head.std_floor,
            pooling=pooling,
            append_eos=append_eos,
            max_score_length=max_score_length,
            # trainers look here for the tokeniser and for the name of the metric
            name_or_path=body.config.name_or_path,
            dtype=body.dtype,
        )
        model = cls(config, trunk=body, head=head.to(body.device))
        model.training = body.training
        return model

    @classmethod
    def from_sequence_classifier(
        cls, classifier: str | os.PathLike[str] | PreTrainedModel, **kwargs: Any
    ) -> EnsembleRewardModel:
        """Anybody's one-head reward model as a stage-1 model: K = 1, aggregation `mean`, the same rewards.

        Taken: `num_labels=1` and one linear head, `score` on a decoder's last token or `classifier` on BERT's pooler.
        The two models' rewards are compared on two short random sequences before anything is returned. The one std is
        a constant, 0.5 + the floor, and means nothing.

        Args:
            classifier: folder, hub name, or a `...ForSequenceClassification` instance (its trunk is used by reference).
            kwargs: `append_eos`, and what `AutoModelForSequenceClassification.from_pretrained` takes.

        Raises:
            ValueError: for another number of labels, another kind of head, missing tensors, or rewards that differ.
        """
        return model_of_sequence_classifier(cls, classifier, kwargs)

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`; the head's present aggregation is what is saved."""
        self.config.aggregation = str(self.score.aggregation)
        super().save_pretrained(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> EnsembleRewardOutput | tuple[Tensor, ...]:
        """Token ids to rewards.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], non-zero where a token is; None: no padding anywhere, whatever the ids are.
            position_ids: [B, T]; None counts the attended tokens.
            return_dict: False for the tuple (logits, mean, std).

        Everything else that trainers pass (use_cache, token_type_ids, labels, ...) is ignored.

        Raises:
            ValueError: for a mask of another shape, or (on the CPU) one that masks a whole row.
        """
        hidden, rows = self._hidden(input_ids, attention_mask, position_ids)
        scored = self.score(hidden, rows)
        output = EnsembleRewardOutput(logits=scored.reward[:, None], mean=scored.mean, std=scored.std)
        return output.to_tuple() if return_dict is False else output

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The hidden states the head reads: [B, D] in the trunk's dtype, differentiable. Arguments as in `forward`."""
        hidden, rows = self._hidden(input_ids, attention_mask, None)
        return hidden if rows is None else hidden.flatten(0, 1).index_select(0, rows)

    def _hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, T, D] and the row of each sequence in them, or pooled states [B, D] and None."""
        _check_mask(input_ids, attention_mask)
        limit = max_positions(self.config.text_config)
        if limit is not None and input_ids.shape[1] > limit:
            warnings.warn(
                f"EnsembleRewardModel: a sequence is longer than the trunk's {limit} positions: its reward says little",
                stacklevel=3,
            )
        options: dict[str, Any] = {}
        if position_ids is None and attention_mask is not None:
            position_ids = attended_positions(attention_mask, position_offset(self.config.text_config))
        if position_ids is not None and self._takes_positions:
            options["position_ids"] = position_ids
        if self.config.pooling == "last":
            options["use_cache"] = False
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **options
        ).last_hidden_state
        rows = pooled_rows(input_ids, attention_mask, first=self.config.pooling != "last")
        if self.config.pooling != "pooler":
            return hidden, rows
        # BERT's pooler reads position 0 of what it is given, which left padding would make a padding token
        return self.model.pooler(hidden.flatten(0, 1).index_select(0, rows)[:, None]), None


def attended_positions(attention_mask: Tensor, offset: int = 0) -> Tensor:
    """[B, T] mask -> [B, T] int64: how many attended tokens stand before each one, plus `offset`; of padding, any."""
    return (attention_mask.ne(0).long().cumsum(dim=1) - 1).clamp_min(0) + offset


def pooled_rows(input_ids: Tensor, attention_mask: Tensor | None, first: bool) -> Tensor:
    """[B] int64: the row, in hidden states flattened to [B * T, D], of each sequence's first or last attended token."""
    batch, length = input_ids.shape
    place = torch.arange(length, device=input_ids.device)
    start = torch.arange(batch, device=input_ids.device) * length
    if attention_mask is None:
        return start + (0 if first else length - 1)
    attended = attention_mask.ne(0)
    index = torch.where(attended, place, length - 1).amin(1) if first else torch.where(attended, place, 0).amax(1)
    return start + index


def _check_mask(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"EnsembleRewardModel: input_ids: expected [B, T] with T above 0, got {list(input_ids.shape)}")
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"EnsembleRewardModel: attention_mask: expected input_ids' shape {list(input_ids.shape)}, "
            f"got {list(attention_mask.shape)}"
        )
    # reading device memory would stall the stream, and a compiler cannot trace the question
    if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        empty = attention_mask.ne(0).any(1).logical_not()
        if bool(empty.any()):
            row = int(empty.int().argmax())
            raise ValueError(
                f"EnsembleRewardModel: attention_mask: expected a token in every row, got none in row {row}"
            )


def _check_head(head: EnsembleHead, hidden_size: int, num_heads: int | None, std_floor: float | None) -> None:
    for name, wanted, got in (
        ("hidden_size", hidden_size, head.hidden_size),
        ("num_heads", num_heads, head.num_heads),
        ("std_floor", std_floor, head.std_floor),
    ):
        if wanted is not None and wanted != got:
            raise ValueError(f"EnsembleRewardModel.from_trunk: head: expected {name} {wanted}, got {got}")


AutoConfig.register(EnsembleRewardConfig.model_type, EnsembleRewardConfig, exist_ok=True)
AutoModel.register(EnsembleRewardConfig, EnsembleRewardModel, exist_ok=True)
AutoModelForSequenceClassification.register(EnsembleRewardConfig, EnsembleRewardModel, exist_ok=True)


def model_of_sequence_classifier(
    cls: type[EnsembleRewardModel], source: str | os.PathLike[str] | PreTrainedModel, kwargs: dict[str, Any]
) -> EnsembleRewardModel:
    """See `EnsembleRewardModel.from_sequence_classifier`."""
    where = "from_sequence_classifier"
    append_eos = kwargs.pop("append_eos", None)
    if isinstance(source, PreTrainedModel):
        _refuse_options(where, kwargs)
        original = source
        _check_labels(original.config)
    else:
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        _check_labels(AutoConfig.from_pretrained(source, **hub))
        with reading_weights(source):
            original, info = AutoModelForSequenceClassification.from_pretrained(
                source, output_loading_info=True, **kwargs
            )
        refuse_missing(where, source, info["missing_keys"])
    trunk: Any = original.base_model
    linear = _linear_head(original, trunk.config.hidden_size)
    head = EnsembleHead(trunk.config.hidden_size, 1, aggregation="mean")
    with torch.no_grad():
        head.weight[0] = linear.weight[0]
        head.weight[1] = 0.0
        head.bias[0] = 0.0 if linear.bias is None else linear.bias[0]
    pooled = is_encoder(trunk.config) and getattr(trunk, "pooler", None) is not None
    model = cls.from_trunk(trunk, head=head, pooling="pooler" if pooled else None, append_eos=append_eos)
    _check_same_rewards(original, model, linear)
    return model


def _check_same_rewards(original: PreTrainedModel, model: EnsembleRewardModel, linear: nn.Linear) -> None:
    """Refuse an architecture that does something between trunk and head: two random sequences must score alike."""
    generator = torch.Generator().manual_seed(0)
    # the original finds its last token by the padding id, so the probe must not contain it
    allowed = torch.ones(original.config.vocab_size)
    padding = getattr(original.config, "pad_token_id", None)
    if padding is not None:
        allowed[padding] = 0.0
    pairs = []
    with evaluating(original):
        for length in (5, 9):
            ids = allowed.multinomial(length, replacement=True, generator=generator)[None].to(original.device)
            mask = torch.ones_like(ids)
            want = original(input_ids=ids, attention_mask=mask).logits.float().view(())
            hidden = model.features(ids, mask)
            got = model.score(hidden).reward.view(())
            # the original rounds its reward to its own dtype; both add up D products, in fp32 at least
            terms = (hidden.float().abs() @ linear.weight.float().abs().T).view(())
            tolerance = 8 * torch.finfo(original.dtype).eps * want.abs() + 1e-5 * terms
            pairs.append((float(got), float(want), float(tolerance)))
    if not all(abs(got - want) <= tolerance for got, want, tolerance in pairs):
        raise ValueError(
            f"from_sequence_classifier: {type(original).__name__}: expected the reward to be one linear layer on the "
            f"trunk's hidden state, got {[p[0] for p in pairs]} that way where the model says {[p[1] for p in pairs]}"
        )
