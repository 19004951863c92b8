"""`EnsembleRewardModel`: a Hugging Face trunk with an `EnsembleHead`, which trainers take as a sequence classifier."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from ..kernels import STD_FLOOR, Aggregation
from .config import EnsembleRewardConfig, max_positions, padding_id
from .convert import check_head, check_lm_head, load_trunk, model_of_sequence_classifier
from .families import follows_length, length_classes, reset_frequencies
from .head import EnsembleHead
from .likelihood import LanguageHead, LogitRule, response_logprob, ties_head
from .own_code import refusing_own_code, without_own_code
from .pooling import check_mask, check_start, pooled_rows, response_mask, right_padded
from .taps import Tap, blocks_of, capturing, read_taps
from .weights import reading_weights, refuse_missing


@dataclass
class EnsembleRewardOutput(ModelOutput):
    """Output of `EnsembleRewardModel` for B sequences and K heads, all fp32.

    loss      always None: training jobs compute the loss; the field exists for trainers that look for it
    logits    [B, 1]  the aggregated reward
    mean      [B, K]  the heads' means, calibrated
    std       [B, K]  the heads' standard deviations, calibrated, > 0
    distance  [B]     from the reference responses, 1 = their 95 % quantile; None without a trust region
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    distance: Tensor | None = None


class EnsembleRewardModel(PreTrainedModel):
    """A reward model with uncertainty: one trunk (`.model`) and K Gaussian heads (`.score`).

    Works wherever a `...ForSequenceClassification` with `num_labels=1` works: `logits` is [B, 1]. A decoder's heads
    read the last token that the attention mask marks (see `config.pooling`). If `from_sequence_classifier` made the
    model, they read the last such token other than its padding token, as the classifier's own head does
    (`config.skip_token_id`). A sequence gets the same reward alone, padded left or right, and in any batch, because
    every batch is moved to right padding before the trunk. The head computes in fp32 with autocast off and stays fp32
    in memory and on disk when the trunk has a half precision.

    Make one with `from_trunk`, `from_sequence_classifier` or `from_pretrained`. Importing `prudent.engine` registers
    the class with transformers' Auto classes, so that `AutoModelForSequenceClassification.from_pretrained(folder)` and
    trainers that take a path find it. In TRL: `GRPOTrainer(reward_funcs=model, reward_processing_classes=tokenizer)`.
    Trainers neither truncate for a reward model nor put it in eval mode: the model warns of sequences that are too
    long; put a trunk with dropout in eval mode yourself.

    With `config.taps` the heads read several states of the one forward pass, concatenated. If one reads the response (a
    mean, or its log-probability), the model needs `response_start` and refuses to guess it: token ids alone do not say
    where the response begins, so trainers that give no more (TRL's) take a model with `features=last`.

    Args:
        config: with `text_config` set.
        trunk: an existing trunk, used by reference; None builds one from `config.text_config` with random weights.
        head: an existing head, used by reference; None builds a fresh one.
        lm_head: the language-model head, used by reference, of a trunk that does not share it with its embeddings; only
            for the tap logprob. None builds one with random weights.
    """

    config: EnsembleRewardConfig
    config_class = EnsembleRewardConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # the trunk's own constructor refuses an attention implementation that it does not support
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"score"}  # noqa: RUF012  as transformers reads it

    def __init__(
        self,
        config: EnsembleRewardConfig,
        trunk: PreTrainedModel | None = None,
        head: EnsembleHead | None = None,
        lm_head: nn.Linear | None = None,
    ) -> None:
        if config.text_config is None:
            raise ValueError("EnsembleRewardModel: config.text_config: expected the trunk's configuration, got None")
        super().__init__(config)
        self.model: Any = trunk
        if trunk is None:
            self.model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        if config.pooling == "pooler" and getattr(self.model, "pooler", None) is None:
            raise ValueError(
                f"EnsembleRewardModel: pooling: expected last or first, because {type(self.model).__name__} has no "
                "pooler, got 'pooler'"
            )
        self._taps: tuple[Tap, ...] | None = None if config.taps is None else config.parsed_taps()
        if self._taps is not None:
            blocks_of(self.model)  # refuses a trunk without a list of its layers
        self.lm_head: nn.Linear | None = None
        if config.reads_logprob:
            self._logit_rule = LogitRule.of(config.text_config, type(self.model).__name__)
            if not ties_head(config.text_config):
                text = config.text_config
                self.lm_head = lm_head or nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.score = head or EnsembleHead(
            config.feature_size,
            config.num_heads,
            aggregation=config.aggregation,
            std_floor=config.std_floor,
            trust_directions=config.trust_directions,
        )
        for given in (trunk, head, lm_head):
            # post_init draws new weights for every module without this mark, adapters inside a given trunk included
            for module in () if given is None else given.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._padding_id = padding_id(config.text_config)
        self._follows_length = follows_length(config.text_config)
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EnsembleHead):
            region = module.trust
            fresh = EnsembleHead(
                module.hidden_size,
                module.num_heads,
                trust_directions=None if region is None else len(region.weights),
                device=module.weight.device,
            )
            for name, value in fresh.state_dict().items():
                init.copy_(getattr(module, name), value)  # skips tensors that a checkpoint has filled
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`, but a checkpoint that lacks a tensor is refused, not filled at random.

        Raises:
            ValueError: naming the missing tensors, or the folder whose weights cannot be read.
        """
        name = args[0] if args else ""
        with reading_weights(name), refusing_own_code(name):
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **without_own_code(kwargs))
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
        skip_token_id: int | None = None,
        taps: str | Sequence[str | Tap] | None = None,
        logprob_skips: Sequence[int] | None = None,
        lm_head: nn.Linear | None = None,
        **kwargs: Any,
    ) -> EnsembleRewardModel:
        """Put heads on a trunk: a new ensemble (by default K = 5, `tradeoff:0.4`), or a trained one.

        Args:
            trunk: a folder or hub name of any model that AutoModel loads, or a `PreTrainedModel`. An instance is used
                by reference, with its train or eval mode and its config; of a causal language model, the inner base
                model is taken, so that a rollout policy can share it, and for the tap logprob its head.
            num_heads: K; None: `head`'s, else 5.
            aggregation: of the head; None: `head`'s own, else `tradeoff:0.4`.
            head: a trained `EnsembleHead`, used by reference and moved to the trunk's device; None: a new one.
            std_floor: of a new head.
            pooling, append_eos, max_score_length, skip_token_id, taps, logprob_skips: see `EnsembleRewardConfig`.
            lm_head: for the tap logprob, the language-model head of a base model that is given without it.
            kwargs: passed to `AutoModel.from_pretrained` (dtype, device_map, attn_implementation, ...), only with a
                folder or name; trust_remote_code is False unless given.

        Raises:
            ValueError: for a trunk that is no text model or lacks tensors, or a head that does not fit.
        """
        names_logprob = not isinstance(taps, str) and "logprob" in map(str, taps or ())
        need_lm_head = names_logprob and lm_head is None
        body, own_lm_head = load_trunk(trunk, kwargs, need_pooler=pooling == "pooler", need_lm_head=need_lm_head)
        check_lm_head(lm_head, body.config)
        config = EnsembleRewardConfig(
            text_config=body.config,
            num_heads=head.num_heads if head is not None else 5 if num_heads is None else num_heads,
            aggregation=aggregation or (head.aggregation if head is not None else "tradeoff:0.4"),
            std_floor=head.std_floor if head is not None else STD_FLOOR if std_floor is None else std_floor,
            pooling=pooling,
            append_eos=append_eos,
            max_score_length=max_score_length,
            skip_token_id=skip_token_id,
            taps=taps,
            logprob_skips=logprob_skips,
            # trainers read these to find the tokeniser and to name the metric
            name_or_path=body.config.name_or_path,
            dtype=body.dtype,
        )
        if head is None:
            head = EnsembleHead(
                config.feature_size, config.num_heads, aggregation=config.aggregation, std_floor=config.std_floor
            )
        else:
            check_head(head, config.feature_size, num_heads, std_floor)
            head.aggregation = config.aggregation
        model = cls(config, trunk=body, head=head.to(body.device), lm_head=lm_head or own_lm_head)
        model.training = body.training
        return model

    @classmethod
    def from_sequence_classifier(
        cls, classifier: str | os.PathLike[str] | PreTrainedModel, **kwargs: Any
    ) -> EnsembleRewardModel:
        """Convert a one-head reward model to a stage-1 model with the same rewards: K = 1, aggregation `mean`.

        The classifier must have `num_labels=1` and one linear head: `score` on a decoder's last token, or `classifier`
        on BERT's pooler. A decoder's head reads the last token that is not `config.pad_token_id`, and so does this
        model: it matters if the padding token is the EOS token too. Before it returns, the method compares the two
        models' rewards on short random sequences with that token inside and at their end. The std is a constant,
        0.5 + std_floor, and means nothing. Of a model that `prudent export` wrote (`linear`), the constant that a
        classifier cannot carry, append_eos and max_score_length are restored.

        Args:
            classifier: a folder, a hub name, or a `...ForSequenceClassification` instance (its trunk is used by
                reference).
            kwargs: `append_eos`, and keywords of `AutoModelForSequenceClassification.from_pretrained`;
                trust_remote_code is False unless given.

        Raises:
            ValueError: for another number of labels, another kind of head, missing tensors, or rewards that differ.
        """
        model: EnsembleRewardModel = model_of_sequence_classifier(cls, classifier, kwargs)
        return model

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`; the configuration says the head's present aggregation and trust region."""
        self.config.aggregation = str(self.score.aggregation)
        region = self.score.trust
        self.config.trust_directions = None if region is None else len(region.weights)
        super().save_pretrained(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        response_start: Tensor | None = None,
        **_: Any,
    ) -> EnsembleRewardOutput | tuple[Tensor, ...]:
        """Token ids to rewards.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], non-zero at tokens, 0 at padding; None: no padding, whatever the ids are.
            position_ids: [B, T]; None: the trunk counts the attended tokens by its own rule.
            return_dict: False: return the tuple (logits, mean, std), with a trust region (logits, mean, std, distance).
            response_start: [B] int64, for each row the place of the response's first token among the attended ones,
                counted from 0 (0: the whole row is the response). Needed if, and only read if, a tap reads the
                response: a mean, or logprob.

        Other keywords that trainers pass (use_cache, token_type_ids, labels, ...) are ignored.

        Raises:
            ValueError: for a mask of another shape, or (on the CPU) one that masks a whole row; for a response_start
                that is missing where a tap reads the response, of another shape or dtype, or (on the CPU) outside its
                row.
        """
        hidden, rows = self._hidden(input_ids, attention_mask, position_ids, response_start)
        scored = self.score(hidden, rows)
        output = EnsembleRewardOutput(
            logits=scored.reward[:, None], mean=scored.mean, std=scored.std, distance=scored.distance
        )
        return output.to_tuple() if return_dict is False else output

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, response_start: Tensor | None = None
    ) -> Tensor:
        """The hidden states the head reads: [B, F] in the trunk's dtype, differentiable. Arguments as in `forward`.

        F is `config.feature_size`: D, or the columns of all taps.
        """
        hidden, rows = self._hidden(input_ids, attention_mask, None, response_start)
        return hidden if rows is None else hidden.flatten(0, 1).index_select(0, rows)

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        response_start: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden states [B, T, D], flat index [B] of each sequence's row), or (pooled states [B, F], None)."""
        check_mask(input_ids, attention_mask)
        if not self.config.reads_response:
            response_start = None
        elif response_start is None:
            raise ValueError(
                "EnsembleRewardModel: response_start: expected where each response begins, because this model reads "
                f"the response's tokens ({', '.join(self.config.taps or ())}), got None: where only token ids are "
                "known, as in TRL's trainers, use a model trained with features=last, or score prompts and responses "
                "with `Scorer`"
            )
        else:
            check_start(input_ids, attention_mask, response_start)
        limit = max_positions(self.config.text_config)
        if limit is not None and input_ids.shape[1] > limit:
            warnings.warn(
                f"EnsembleRewardModel: a sequence is longer than the trunk's {limit} positions: its reward says little",
                stacklevel=3,
            )
        if attention_mask is None:
            # without a mask, an encoder may treat its padding token as padding
            attention_mask = None if self.config.pooling == "last" else torch.ones_like(input_ids)
        else:
            input_ids, attention_mask, position_ids = right_padded(
                input_ids, attention_mask, position_ids, self._padding_id
            )
        if self._follows_length and position_ids is None:
            return self._by_length(input_ids, attention_mask, response_start), None
        return self._pass(input_ids, attention_mask, position_ids, response_start)

    def _pass(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        response_start: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """One forward pass of the trunk over right-padded rows; returns what `_hidden` returns."""
        options: dict[str, Any] = {}
        if position_ids is not None and self._takes_positions:
            options["position_ids"] = position_ids
        if self.config.pooling == "last":
            options["use_cache"] = False
        options |= {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict": True}
        first = self.config.pooling != "last"
        rows = pooled_rows(input_ids, attention_mask, first=first, skipped=self.config.skip_token_id)
        if self._taps is not None:
            response = None
            if response_start is not None:
                response = response_mask(input_ids, attention_mask, response_start, rows, first=first)
            with capturing(self.model, [tap.layer for tap in self._taps]) as states:
                output = self.model(**options).last_hidden_state
            logprob = None
            if self.config.reads_logprob:
                assert response is not None
                logprob = response_logprob(self._language_head(), output, input_ids, response)
            return read_taps(self._taps, states, output, rows, response, logprob), None
        hidden = self.model(**options).last_hidden_state
        if self.config.pooling != "pooler":
            return hidden, rows
        return self.model.pooler(hidden.flatten(0, 1).index_select(0, rows)[:, None]), None

    def _language_head(self) -> LanguageHead:
        weight = (self.get_input_embeddings() if self.lm_head is None else self.lm_head).weight
        return LanguageHead(weight, self._logit_rule, self.config.logprob_skips or ())

    def _by_length(self, input_ids: Tensor, attention_mask: Tensor | None, response_start: Tensor | None) -> Tensor:
        """Pooled states [B, F], from one forward pass for each length class."""
        batch, width = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = mask.sum(1).tolist() if attention_mask is not None else [width] * batch
        groups = length_classes(self.config.text_config, lengths)
        pooled = []
        for group in groups:
            longest = max(lengths[row] for row in group)
            index = torch.tensor(group, device=input_ids.device)
            reset_frequencies(self.model)
            start = None if response_start is None else response_start[index]
            hidden, rows = self._pass(input_ids[index, :longest], mask[index, :longest], None, start)
            pooled.append(hidden if rows is None else hidden.flatten(0, 1).index_select(0, rows))
        order = torch.tensor([row for group in groups for row in group], device=input_ids.device)
        return torch.cat(pooled).index_select(0, order.argsort())


AutoConfig.register(EnsembleRewardConfig.model_type, EnsembleRewardConfig, exist_ok=True)
AutoModel.register(EnsembleRewardConfig, EnsembleRewardModel, exist_ok=True)
AutoModelForSequenceClassification.register(EnsembleRewardConfig, EnsembleRewardModel, exist_ok=True)
