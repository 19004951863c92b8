"""What a form cannot carry, said by name before anything is written."""

from __future__ import annotations

from typing import Literal

from ...kernels import Aggregation
from ..config import EnsembleRewardConfig
from ..families import follows_length, is_unpadded, switch_length
from .linear import linear_weights

Form = Literal["stock", "linear", "remote-code"]


def check_form(config: EnsembleRewardConfig, form: Form, spec: Aggregation) -> None:
    """Refuse what the form cannot carry, as far as the configuration says.

    Raises:
        ValueError: for an aggregation that depends on other rows or, as `linear`, on more than a weighted sum of the
            means; for taps or a pooling that the form's loader does not have; for a trunk whose states of a text depend
            on the others of its batch.
    """
    if spec.of_batch or spec.centre != "none":
        raise ValueError(
            f"aggregation: expected one that scores each response by itself, got {str(spec)!r}, whose rewards depend "
            "on the batch"
        )
    _check_taps(config, form)
    _check_trunk(config)
    if form != "remote-code" and config.pooling == "first":
        raise ValueError(
            f"as: expected remote-code, because the heads read the first token itself and the {form} classifier of "
            f"{config.text_config.model_type!r} puts other layers between, got {form}"
        )
    if form == "linear" and linear_weights(spec, config.num_heads) is None:
        raise ValueError(
            "aggregation: expected one that is a weighted sum of the heads' means (mean, head:0), because one label "
            f"carries no other, got {str(spec)!r}: choose one with --aggregation, or export as stock or remote-code"
        )


def _check_taps(config: EnsembleRewardConfig, form: Form) -> None:
    if config.taps is not None and form != "remote-code":
        raise ValueError(
            f"as: expected remote-code, because the heads read {', '.join(config.taps)}, and a classifier of "
            f"transformers the last layer's state alone, got {form}: train with --set features=last for the others"
        )


def _check_trunk(config: EnsembleRewardConfig) -> None:
    trunk = config.text_config
    switch, longest = switch_length(trunk), config.max_score_length
    if is_unpadded(trunk):
        reason = "in which padding changes the states of the tokens beside it"
    elif follows_length(trunk) and (switch is None or longest is None or longest > switch):
        reason = f"whose rotary frequencies change with the longest text of a batch beyond {switch} tokens"
    else:
        return
    raise ValueError(
        f"model: expected a trunk whose states of a text do not depend on its batch, got {trunk.model_type!r}, "
        f"{reason}: prudent's own loader keeps such texts apart, other loaders do not"
    )
