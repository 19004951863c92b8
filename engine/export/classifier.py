"""The forms `stock` and `linear`: the trunk's own `...ForSequenceClassification` of transformers."""

from __future__ import annotations

import copy
import io
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from ..convert import head_of
from ..eval_mode import evaluating
from ..head import EnsembleHead
from ..logits import probe_ids
from .linear import linear_weights


class Folded(NamedTuple):
    """A calibrated head as one linear layer [L, D], which has no bias, and what it leaves out.

    stock   L = 2K: mean = logits[:K] + constant[:K], std = (softplus(logits[K:] + constant[K:]) + floor) / scale
    linear  L = 1:  reward = logit + constant
    """

    weight: Tensor  # [L, D] fp32
    constant: Tensor  # [L] fp64


def fold(head: EnsembleHead, form: str) -> Folded:
    """The calibration's scale goes into the weights of the means; loaders drop a bias without a word, so that shift and
    bias become a constant beside the model. Computed in fp64."""
    k = head.num_heads
    weight, bias, shift, scale = (t.detach().double().cpu() for t in (head.weight, head.bias, head.shift, head.scale))
    means, constants = weight[:k] / scale[:, None], (bias[:k] - shift) / scale
    if form == "stock":
        return Folded(torch.cat([means, weight[k:]]).float(), torch.cat([constants, bias[k:]]))
    found = linear_weights(head.aggregation, k)
    assert found is not None  # check_form refuses the others
    share = torch.tensor(found, dtype=torch.float64)
    return Folded((share @ means)[None].float(), (share @ constants)[None])


def classifier(reward: Any, folded: Folded, padding: int | None, rows: int) -> tuple[Any, bool]:
    """A stock classifier around `reward`'s trunk, by reference, and whether its layer carries the constant.

    padding: the id that a decoder's head skips; None: the trunk's own.   rows: the vocabulary that its config states.

    Raises:
        ValueError: for a family without such a class, or with another head than one linear layer.
    """
    trunk = reward.model
    config = copy.deepcopy(trunk.config)
    labels = len(folded.weight)
    config.num_labels = labels
    config.vocab_size = rows
    config.problem_type = "regression"  # vLLM and pipelines then give the numbers without a softmax or sigmoid
    if padding is not None:
        config.pad_token_id = padding
    try:
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"model: expected a family with a sequence classifier in transformers, got {config.model_type!r}: export "
            "it as remote-code"
        ) from error
    if type(model.base_model) is not type(trunk):
        raise ValueError(
            f"model: expected the trunk of {type(model).__name__}, {type(model.base_model).__name__}, got "
            f"{type(trunk).__name__}: export it as remote-code"
        )
    setattr(model, model.base_model_prefix, trunk)
    name, old = head_of(model)
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"as: expected remote-code, because the head of {type(model).__name__} is not one linear layer, got "
            f"{type(old).__name__}"
        )
    with_bias = old.bias is not None
    layer = nn.Linear(folded.weight.shape[1], labels, bias=with_bias, device=folded.weight.device)
    with torch.no_grad():
        layer.weight.copy_(folded.weight)
        if with_bias:
            layer.bias.copy_(folded.constant if labels == 1 else torch.zeros(labels))
    setattr(model, name, layer)
    between = [name.rpartition(".")[0] for name, tensor in model.named_parameters() if tensor.is_meta]
    if between:
        raise ValueError(
            f"as: expected remote-code, because {type(model).__name__} has a layer between trunk and head, got "
            f"{between[0]}"
        )
    model.eval()
    return model, with_bias and labels == 1


@torch.no_grad()
def check_logits(reward: Any, model: Any, folded: Folded, skipped: int | None) -> None:
    """Refuse a family whose classifier does more than its class says: random sequences must get the same logits."""
    name, layer = head_of(model)
    assert isinstance(layer, nn.Linear)
    device = reward.get_input_embeddings().weight.device
    # in the trunk's dtype, as the loader has it; the model keeps the fp32 layer, which is saved
    setattr(model, name, copy.deepcopy(layer).to(device, reward.model.dtype))
    try:
        with evaluating(model), evaluating(reward):
            for length in (5, 9):
                ids = probe_ids(reward.model, length)[None]
                if skipped is not None and length == 9:
                    ids[0, [2, 7, 8]] = skipped
                mask = torch.ones_like(ids)
                want = model(input_ids=ids, attention_mask=mask).logits.double()
                features = reward.features(ids, mask).double()
                bias = 0.0 if layer.bias is None else layer.bias.double().to(device)
                got = features @ folded.weight.double().to(device).T + bias
                terms = features.abs() @ folded.weight.double().to(device).abs().T
                tolerance = 8 * torch.finfo(reward.model.dtype).eps * terms + 1e-5 * terms
                if not bool(((got - want).abs() <= tolerance).all()):
                    raise ValueError(
                        f"as: expected remote-code, because {type(model).__name__} reads another state than the heads, "
                        f"or more than one linear layer: its logits begin {want.flatten()[:2].tolist()}, the heads' "
                        f"{got.flatten()[:2].tolist()}"
                    )
    finally:
        setattr(model, name, layer)


def head_numbers(head: EnsembleHead, folded: Folded) -> dict[str, Any]:
    """The content of prudent_head.json, which the client reads."""
    return {
        "num_heads": head.num_heads,
        "aggregation": str(head.aggregation),
        "offset": folded.constant.tolist(),
        "scale": head.scale.double().tolist(),
        "std_floor": head.std_floor,
        "std_ref": head.std_ref.double().tolist(),
        "unit": None if head.trust is None else float(head.trust.unit),
    }


def region_bytes(head: EnsembleHead) -> bytes | None:
    """The trust region as a .npz, in fp32; None without one.

    Not as .safetensors: engines read every such file of a folder as weights of the model.
    """
    if head.trust is None:
        return None
    names = ("mean", "precision", "directions", "weights")
    stream = io.BytesIO()
    np.savez(stream, **{name: getattr(head.trust, name).float().cpu().numpy() for name in names})
    return stream.getvalue()
