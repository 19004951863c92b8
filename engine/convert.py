"""Other people's models as trunks and as stage-1 reward models, with every check on the way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModel, PreTrainedModel

from .weights import reading_weights, refuse_missing

if TYPE_CHECKING:
    pass

# what says where a model is found, and so concerns its configuration too
_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def load_trunk(source: str | os.PathLike[str] | PreTrainedModel, kwargs: dict[str, Any], need_pooler: bool) -> Any:
    """The base model of a folder or hub name, or of an instance (by reference); text only, encoder or decoder."""
    if isinstance(source, PreTrainedModel):
        _refuse_options("from_trunk", kwargs)
        trunk: Any = source.base_model
    elif isinstance(source, nn.Module):
        raise ValueError(
            f"from_trunk: trunk: expected a folder, a hub name or a PreTrainedModel, got {type(source).__name__} "
            "(of a PEFT model, give `get_base_model()`)"
        )
    else:
        with reading_weights(source):
            model, info = AutoModel.from_pretrained(source, output_loading_info=True, **kwargs)
        trunk = model.base_model
        # language-model checkpoints of the BERT family come without the pooler, which `first` pooling does not read
        missing = (key for key in info["missing_keys"] if need_pooler or not key.startswith("pooler."))
        refuse_missing("from_trunk", source, missing)
    if not isinstance(getattr(trunk.config, "hidden_size", None), int):
        raise ValueError(
            f"from_trunk: trunk: expected a text model with config.hidden_size, got {type(trunk).__name__}, whose "
            "configuration has none"
        )
    return trunk


def _refuse_options(where: str, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise ValueError(f"{where}: {', '.join(kwargs)}: expected only with a folder or name, got it beside a model")


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


def _linear_head(model: PreTrainedModel, hidden_size: int) -> nn.Linear:
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if head is None:
            continue
        if not isinstance(head, nn.Linear):
            break
        if tuple(head.weight.shape) != (1, hidden_size):
            raise ValueError(
                f"from_sequence_classifier: {name}.weight: expected shape [1, {hidden_size}], "
                f"got {list(head.weight.shape)}"
            )
        return head
    else:
        name, head = "score", None
    raise ValueError(
        f"from_sequence_classifier: {name}: expected one linear layer as the head of {type(model).__name__}, "
        f"got {'none' if head is None else type(head).__name__}"
    )
