"""Convert existing models: any text model to a trunk, a one-head classifier to a reward model; check both."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from .config import is_encoder
from .eval_mode import evaluating
from .families import check_family
from .head import EnsembleHead
from .likelihood import ties_head
from .logits import checked_head
from .own_code import load_config, refusing_own_code, without_own_code
from .weights import reading_weights, refuse_missing


def load_trunk(
    source: str | os.PathLike[str] | PreTrainedModel, kwargs: dict[str, Any], need_pooler: bool, need_lm_head: bool
) -> tuple[Any, nn.Linear | None]:
    """Load the base model from a folder or hub name, or take it from an instance by reference; text models only.

    With `need_lm_head`, also return the language-model head if the embeddings are not it.
    """
    lm_head = None
    if isinstance(source, PreTrainedModel):
        _refuse_options("from_trunk", kwargs)
        trunk: Any = source.base_model
        if need_lm_head:
            lm_head = _lm_head(source)
    elif isinstance(source, nn.Module):
        raise ValueError(
            f"from_trunk: trunk: expected a folder, a hub name or a PreTrainedModel, got {type(source).__name__} "
            "(of a PEFT model, give `get_base_model()`)"
        )
    else:
        check_family(config := load_config(source, kwargs))
        need_lm_head = need_lm_head and not is_encoder(config)  # of BERT's family, whose taps are refused later
        kind: Any = AutoModelForCausalLM if need_lm_head else AutoModel
        with reading_weights(source), refusing_own_code(source):
            model, info = kind.from_pretrained(source, output_loading_info=True, **without_own_code(kwargs))
        trunk = model.base_model
        if need_lm_head:
            lm_head = _lm_head(model)
        # language-model checkpoints of the BERT family lack the pooler, which only `pooler` pooling reads
        missing = (key for key in info["missing_keys"] if need_pooler or not key.startswith("pooler."))
        refuse_missing("from_trunk", source, missing)
    if not isinstance(getattr(trunk.config, "hidden_size", None), int):
        raise ValueError(
            f"from_trunk: trunk: expected a text model with config.hidden_size, got {type(trunk).__name__} without it"
        )
    return trunk, lm_head


def _lm_head(model: Any) -> nn.Linear | None:
    """The language-model head, None if the embeddings are it, or for an encoder, which the configuration refuses.

    A base model that was given without its head can only be taken at its configuration's word.

    Raises:
        ValueError: for a head that the tap logprob cannot use.
    """
    if is_encoder(model.base_model.config):
        return None
    tied, head = ties_head(model.base_model.config), model.get_output_embeddings()
    if tied and head is None:
        return None
    try:
        checked_head(model)
    except ValueError as error:
        reason = str(error).removeprefix("model: ")
        raise ValueError(f"from_trunk: taps: {reason}, so that it cannot give logprob") from None
    if not tied:
        return head  # type: ignore[no-any-return]
    embedded = model.get_input_embeddings().weight
    if head.weight is not embedded and not torch.equal(head.weight, embedded):
        raise ValueError(
            f"from_trunk: trunk: expected a head that shares the embeddings' weights, as tie_word_embeddings says, got "
            f"other weights in {type(model).__name__}: set tie_word_embeddings to false in its config.json"
        )
    return None


def check_lm_head(lm_head: nn.Linear | None, config: Any) -> None:
    """Refuse a given language-model head that does not fit the trunk of this configuration, or that nothing reads."""
    if lm_head is None:
        return
    if ties_head(config):
        raise ValueError("from_trunk: lm_head: expected none, because the trunk's embeddings are its head, got one")
    if lm_head.weight.shape[1] != config.hidden_size:
        raise ValueError(
            f"from_trunk: lm_head: expected weight [V, {config.hidden_size}], got {list(lm_head.weight.shape)}"
        )


def check_head(head: EnsembleHead, hidden_size: int, num_heads: int | None, std_floor: float | None) -> None:
    """Refuse a given head of another width, K or std_floor than was asked for; None: any."""
    for name, wanted, got in (
        ("hidden_size", hidden_size, head.hidden_size),
        ("num_heads", num_heads, head.num_heads),
        ("std_floor", std_floor, head.std_floor),
    ):
        if wanted is not None and wanted != got:
            raise ValueError(f"EnsembleRewardModel.from_trunk: head: expected {name} {wanted}, got {got}")


def model_of_sequence_classifier(
    cls: Any, source: str | os.PathLike[str] | PreTrainedModel, kwargs: dict[str, Any]
) -> Any:
    """`EnsembleRewardModel.from_sequence_classifier`; `cls` is that class."""
    where = "from_sequence_classifier"
    append_eos = kwargs.pop("append_eos", None)
    if isinstance(source, PreTrainedModel):
        _refuse_options(where, kwargs)
        original = source
        _check_labels(original.config)
    else:
        _check_labels(load_config(source, kwargs))
        with reading_weights(source), refusing_own_code(source):
            original, info = AutoModelForSequenceClassification.from_pretrained(
                source, output_loading_info=True, **without_own_code(kwargs)
            )
        refuse_missing(where, source, info["missing_keys"])
    note = getattr(original.config, "prudent", None)  # of `prudent export`, which knows what a classifier cannot say
    note = note if isinstance(note, dict) else {}
    trunk: Any = original.base_model
    linear = _linear_head(original, trunk.config.hidden_size)
    head = EnsembleHead(trunk.config.hidden_size, 1, aggregation="mean")
    with torch.no_grad():
        head.weight[0] = linear.weight[0]
        head.weight[1] = 0.0
        head.bias[0] = 0.0 if linear.bias is None else linear.bias[0]
    pooled = is_encoder(trunk.config) and getattr(trunk, "pooler", None) is not None
    model = cls.from_trunk(
        trunk,
        head=head,
        pooling="pooler" if pooled else None,
        append_eos=note.get("append_eos") if append_eos is None else append_eos,
        max_score_length=note.get("max_score_length"),
        skip_token_id=_padding_token(original),
    )
    if model.config.pooling != "last":
        model.config.skip_token_id = None
    _check_same_rewards(original, model, linear)
    with torch.no_grad():
        head.bias[0] += note.get("constant", 0.0)
    return model


def _padding_token(original: PreTrainedModel) -> int | None:
    """The padding token, which a decoder's classification head skips at the end of a sequence; None if it has none.

    transformers' heads read the last id that is not `pad_token_id`, attended or not; without a `pad_token_id`, the
    last id.
    """
    embeddings: Any = original.get_input_embeddings()
    padding = getattr(original.config.get_text_config(), "pad_token_id", None)
    return padding if isinstance(padding, int) and 0 <= padding < embeddings.num_embeddings else None


def _check_same_rewards(original: PreTrainedModel, model: Any, linear: nn.Linear) -> None:
    """Refuse an architecture with other steps between trunk and head: random sequences must get the same rewards."""
    pairs = []
    with evaluating(original):
        for probe in _probes(original):
            ids = probe[None].to(original.device)
            mask = torch.ones_like(ids)
            want = original(input_ids=ids, attention_mask=mask).logits.float().view(())
            hidden = model.features(ids, mask)
            got = model.score(hidden).reward.view(())
            # the original rounds its reward to its own dtype; both models sum D products, in at least fp32
            terms = (hidden.float().abs() @ linear.weight.float().abs().T).view(())
            tolerance = 8 * torch.finfo(original.dtype).eps * want.abs() + 1e-5 * terms
            pairs.append((float(got), float(want), float(tolerance)))
    if not all(abs(got - want) <= tolerance for got, want, tolerance in pairs):
        raise ValueError(
            f"from_sequence_classifier: {type(original).__name__}: expected the reward to be one linear layer on the "
            f"trunk's hidden state of the first token, or of the last that is not padding: the model's rewards are "
            f"{[p[1] for p in pairs]}, got {[p[0] for p in pairs]}"
        )


def _probes(original: PreTrainedModel) -> list[Tensor]:
    """Random sequences [T]: two plain ones, and one with the padding token inside it and twice at its end."""
    generator = torch.Generator().manual_seed(0)
    embeddings: Any = original.get_input_embeddings()
    allowed = torch.ones(embeddings.num_embeddings)
    padding = _padding_token(original)
    if padding is not None:
        allowed[padding] = 0.0
    plain, long, padded = (allowed.multinomial(n, replacement=True, generator=generator) for n in (5, 9, 8))
    if padding is None:
        return [plain, long]
    padded[[2, 6, 7]] = padding
    return [plain, long, padded]


def _refuse_options(where: str, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise ValueError(f"{where}: {', '.join(kwargs)}: expected only with a folder or name, got a model instance")


def _check_labels(config: Any) -> None:
    if config.num_labels != 1:
        kinds = config.architectures or ()
        if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise ValueError(
                f"from_sequence_classifier: expected a reward model, got {kinds[0]}, a model without a reward head"
            )
        raise ValueError(
            f"from_sequence_classifier: num_labels: expected 1 (a reward model), got {config.num_labels} in the "
            f"{config.model_type!r} configuration"
        )


def head_of(classifier: PreTrainedModel) -> tuple[str, nn.Module | None]:
    """The name and the head of a sequence classifier; ("score", None) if it has neither of the usual names."""
    found = ((name, getattr(classifier, name, None)) for name in ("score", "classifier"))
    return next(((name, head) for name, head in found if head is not None), ("score", None))


def _linear_head(model: PreTrainedModel, hidden_size: int) -> nn.Linear:
    name, head = head_of(model)
    if isinstance(head, nn.Linear):
        if tuple(head.weight.shape) != (1, hidden_size):
            raise ValueError(
                f"from_sequence_classifier: {name}.weight: expected shape [1, {hidden_size}], "
                f"got {list(head.weight.shape)}"
            )
        return head
    raise ValueError(
        f"from_sequence_classifier: {name}: expected one linear layer as the head of {type(model).__name__}, "
        f"got {'none' if head is None else type(head).__name__}"
    )
