"""Other people's models as trunks and as stage-1 reward models, with every check on the way."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from .config import is_encoder
from .head import EnsembleHead
from .mode import evaluating

if TYPE_CHECKING:
    from .model import EnsembleRewardModel

# what says where a model is found, and so concerns its configuration too
_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def refuse_missing(where: str, name: object, missing: Iterable[str]) -> None:
    """Raise ValueError if a checkpoint lacked tensors, which transformers fills with random numbers and a warning."""
    lost = sorted(missing)
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ValueError(
            f"{where}: {str(name)!r}: expected every tensor of the model in the checkpoint, got none for {shown}"
        )


@contextmanager
def reading_weights(name: object) -> Iterator[None]:
    """Turn what readers of weights raise for a file that is cut short or of another shape into one ValueError."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise  # says enough; torch's reader of a file cut short gives a bare number
        lines = [*(str(error) or "the file ends early").splitlines(), ""]
        # torch lists every tensor that does not fit under a heading: the first tells enough
        reason = (lines[0] if not lines[0].endswith(":") else lines[1].strip()).partition(". ")[0]
        if "ignore_mismatched_sizes" in reason:
            reason = "their shapes are not those of its config.json"
        raise ValueError(f"{name}: its weights cannot be read ({reason})") from error


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
