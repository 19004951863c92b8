"""Configure an ensemble reward model: its trunk, its heads, and the hidden state that the heads read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..kernels import STD_FLOOR, Aggregation
from .families import check_family, switch_length
from .taps import Tap, features_size, layers_of, parse_taps, reads_logprob, reads_response

POOLINGS = ("last", "first", "pooler")


class EnsembleRewardConfig(PreTrainedConfig):
    """Configuration of `EnsembleRewardModel`.

    Args:
        text_config: the trunk's configuration, or its dictionary.
        num_heads: K.
        aggregation: how K heads become one reward, as `Aggregation` or its string; stored as the string.
        std_floor: least std of a head before calibration.
        pooling: the hidden state that the heads read: of the `last` attended token (decoders), of the `first`
            (encoders), or the trunk's own `pooler` output (BERT's tanh layer). None: `first` for a bidirectional
            encoder, else `last`.
        append_eos: whether `Scorer` ends a complete plain-text response with the tokeniser's EOS token. It never
            changes token ids or the output of a chat template, which ends its own turns. None: yes for decoders, no
            for encoders, whose tokeniser ends every sequence itself. Choose it once, when the heads are trained: with
            another last token, the heads give another reward. TRL's GRPO and RLOO strip the EOS token from plain-text
            rollouts before they call a reward model, so train a model for plain text there with False.
        max_score_length: tokens of the longest sequence that the heads were trained on; `Scorer` truncates longer
            sequences to it by default. None: as many as the trunk has positions. (The name is not `max_length`:
            transformers takes that for a generation setting and refuses to save it in a configuration.)
        skip_token_id: with pooling `last`, the heads read the last attended token other than this one; None: the last
            attended token. `from_sequence_classifier` sets it to the padding id that the classifier's own head skips.
        trust_directions: R of the head's trust region, whose buffers the checkpoint fills; None: no trust region.
        taps: the hidden states that the heads read, concatenated: `last` (or None; the trunk's output at the token that
            pooling names), `wide` (see `taps.wide_taps`), or a list such as ["last:-1", "mean:20", "logprob"]
            (`taps.Tap`). A tap of kind mean or logprob reads the response, so that the model must know where it begins:
            `Scorer` and PPO do, a caller that has only token ids gives `response_start`. Kept with absolute layers,
            and left out of config.json for `last`.
        logprob_skips: ids that the tap logprob leaves out, see `likelihood.special_ids`; None: none. Read with that tap
            alone.
        kwargs: `PreTrainedConfig`'s. num_labels must be 1: trainers read column 0 of the logits.

    Raises:
        ValueError: for another aggregation, pooling, max_score_length, skip_token_id, trust_directions or num_labels,
            or for a trunk whose hidden states of a text depend on the other texts of the batch; for taps that the trunk
            does not have, or that are read beside the pooler.
    """

    model_type = "prudent_ensemble_reward"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  as transformers reads it
    has_no_defaults_at_init = True
    taps: list[str] | None = None
    logprob_skips: list[int] | None = None

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_heads: int = 5,
        aggregation: str | Aggregation = "tradeoff:0.4",
        std_floor: float = STD_FLOOR,
        pooling: str | None = None,
        append_eos: bool | None = None,
        max_score_length: int | None = None,
        skip_token_id: int | None = None,
        trust_directions: int | None = None,
        taps: str | Sequence[str | Tap] | None = None,
        logprob_skips: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            fields = dict(text_config)
            text_config = AutoConfig.for_model(fields.pop("model_type", ""), **fields)
        if text_config is not None and text_config.is_encoder_decoder:
            raise ValueError(
                f"EnsembleRewardConfig: text_config: expected a decoder or an encoder, got {text_config.model_type!r}, "
                "which is an encoder-decoder"
            )
        if text_config is not None:
            check_family(text_config)
        if pooling not in (None, *POOLINGS):
            raise ValueError(f"EnsembleRewardConfig: pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        if max_score_length is not None and (type(max_score_length) is not int or max_score_length < 1):
            raise ValueError(
                f"EnsembleRewardConfig: max_score_length: expected a whole number above 0, got {max_score_length!r}"
            )
        if skip_token_id is not None and (type(skip_token_id) is not int or skip_token_id < 0):
            raise ValueError(
                f"EnsembleRewardConfig: skip_token_id: expected a token id, 0 or above, got {skip_token_id!r}"
            )
        if trust_directions is not None and (type(trust_directions) is not int or trust_directions < 0):
            raise ValueError(
                f"EnsembleRewardConfig: trust_directions: expected a whole number, 0 or above, got {trust_directions!r}"
            )
        spec = Aggregation.parse(aggregation)
        spec.check_heads(num_heads)
        encoder = text_config is not None and is_encoder(text_config)
        self.num_heads = num_heads
        self.aggregation = str(spec)
        self.std_floor = std_floor
        self.pooling = pooling or ("first" if encoder else "last")
        self.append_eos = (not encoder) if append_eos is None else append_eos
        self.max_score_length = max_score_length
        self.skip_token_id = skip_token_id
        self.trust_directions = trust_directions
        if taps not in (None, "last"):
            self._set_taps(taps, text_config)
        if self.reads_logprob:
            self.logprob_skips = [] if logprob_skips is None else [*logprob_skips]
        kwargs.setdefault("num_labels", 1)  # transformers' own default is 2
        super().__init__(**kwargs)
        # set after super().__init__, which would reset the trunk's attention and experts implementations to None
        self.text_config: Any = text_config
        for name in ("attn_implementation", "experts_implementation"):
            if kwargs.get(name) is not None:
                setattr(self, f"_{name}", kwargs[name])
        if self.num_labels != 1:
            raise ValueError(f"EnsembleRewardConfig: num_labels: expected 1 (one reward a row), got {self.num_labels}")

    def _set_taps(self, taps: str | Sequence[str | Tap], trunk: Any) -> None:
        try:
            if trunk is None:
                raise ValueError(f"taps: expected none without a text_config, got {taps!r}")
            parsed = parse_taps(taps, layers := layers_of(trunk))
        except ValueError as error:
            raise ValueError(f"EnsembleRewardConfig: {error}") from None
        if parsed == parse_taps("last", layers):
            return
        if self.pooling == "pooler":
            raise ValueError(
                "EnsembleRewardConfig: pooling: expected last or first with taps, because the pooler reads the trunk's "
                "output alone, got pooler"
            )
        if reads_logprob(parsed) and self.pooling != "last":
            raise ValueError(
                "EnsembleRewardConfig: taps: expected states alone of an encoder, which predicts no next token, got "
                "logprob"
            )
        self.taps = [str(tap) for tap in parsed]

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, without the folder that the trunk came from: a path of one machine."""
        found: dict[str, Any] = super().to_dict()
        if isinstance(found.get("text_config"), dict):
            found["text_config"].pop("_name_or_path", None)
        return found

    @property
    def hidden_size(self) -> int:
        """D, the trunk's width. Tools that allocate buffers read it here and not in text_config."""
        if self.text_config is None:
            raise AttributeError("EnsembleRewardConfig has no hidden_size without a text_config")
        return int(self.text_config.hidden_size)

    @property
    def feature_size(self) -> int:
        """F, the width of what the heads read: D for each state, 2 for logprob."""
        return self.hidden_size if self.taps is None else features_size(self.parsed_taps(), self.hidden_size)

    def parsed_taps(self) -> tuple[Tap, ...]:
        """The taps; without any, the trunk's output at the pooled token."""
        return parse_taps(self.taps or "last", layers_of(self.text_config))

    @property
    def reads_response(self) -> bool:
        """Whether a tap reads the response's tokens, so that one must know where it begins."""
        return self.taps is not None and reads_response(self.parsed_taps())

    @property
    def reads_logprob(self) -> bool:
        """Whether a tap is the response's log-probability, for which the model needs a language-model head."""
        return self.taps is not None and "logprob" in self.taps


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a trunk of this configuration attends in both directions, so that its first token sees the whole text."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence a trunk of this configuration takes, in tokens; None if it states no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - (position_offset(config) if config.model_type in _POSITIONS_AFTER_PADDING else 0)


def longest_in_company(config: PreTrainedConfig) -> int | None:
    """The longest sequence that can share a batch with shorter ones without changing their hidden states.

    `max_positions`, or less if a longer sequence changes the rotary frequencies of the whole batch (longrope).
    """
    return min((n for n in (max_positions(config), switch_length(config)) if n is not None), default=None)


def position_offset(config: PreTrainedConfig) -> int:
    """The position id of the first token: 0, padding index + 1 (RoBERTa's descendants), or 2 (_POSITIONS_FROM_TWO)."""
    if config.model_type in _POSITIONS_AFTER_PADDING:
        return padding_id(config) + 1
    return 2 if config.model_type in _POSITIONS_FROM_TWO else 0


def padding_id(config: PreTrainedConfig) -> int:
    """The token id that pads a batch: the trunk's own padding token, or 0 if it has none."""
    padding = getattr(config, "pad_token_id", None)
    known = isinstance(padding, int) and 0 <= padding < getattr(config, "vocab_size", 0)
    return int(padding) if known else 0  # type: ignore[arg-type]


# no token uses the rows of their position tables up to the padding index
_POSITIONS_AFTER_PADDING = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod"),
        *("ibert", "longformer", "mpnet", "luke", "markuplm", "esm", "lilt", "layoutlmv3"),
    }
)
# their position tables have max_position_embeddings + 2 rows
_POSITIONS_FROM_TWO = frozenset({"mra", "nystromformer", "yoso"})
