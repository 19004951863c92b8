"""The form `remote-code`: the model as it is, with one file of code beside it that needs no prudent."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..eval_mode import evaluating
from ..logits import probe_ids, probe_tolerance
from . import modeling_prudent

MODELLING = "modeling_prudent.py"
AUTO_MAP = {
    "AutoConfig": "modeling_prudent.EnsembleRewardConfig",
    "AutoModel": "modeling_prudent.EnsembleRewardModel",
    "AutoModelForSequenceClassification": "modeling_prudent.EnsembleRewardModel",
}


@torch.no_grad()
def check_remote(reward: Any) -> None:
    """Refuse a family on which the file's code computes something else: two random sequences of one batch must get the
    same means, stds and distances, padded on either side."""
    names = ("num_heads", "std_floor", "pooling", "skip_token_id", "taps", "logprob_skips")
    fields = {name: getattr(reward.config, name) for name in names} | {"aggregation": str(reward.score.aggregation)}
    region = reward.score.trust
    config = modeling_prudent.EnsembleRewardConfig(
        copy.deepcopy(reward.config.text_config),
        trust_directions=None if region is None else len(region.weights),
        **fields,
    )
    with torch.device("meta"):
        remote: Any = modeling_prudent.EnsembleRewardModel(config)
    remote.model, remote.lm_head = reward.model, reward.lm_head
    remote.score = modeling_prudent.Heads(reward.score.hidden_size, config)
    remote.score.load_state_dict(reward.score.state_dict())
    remote.score.to(reward.score.weight.device)
    ids = probe_ids(reward.model, 9)
    for left in (False, True):
        batch, mask = torch.stack([ids, ids]), torch.ones(2, 9, dtype=torch.long, device=ids.device)
        mask[1, slice(0, 4) if left else slice(5, 9)] = 0
        start = torch.tensor([3, 2], device=ids.device) if reward.config.reads_response else None
        with evaluating(remote), evaluating(reward):
            want = reward(batch, mask, response_start=start)
            got = remote(batch, mask, response_start=start)
        for name in ("mean", "std", "distance", "logits"):
            ours, theirs = getattr(want, name), getattr(got, name)
            if ours is None:
                continue
            tolerance = probe_tolerance(reward.model.dtype) * ours.abs().amax().clamp_min(1.0)
            if not bool(((ours - theirs).abs() <= tolerance).all()):
                raise ValueError(
                    f"model: expected a trunk that {MODELLING} can run, got {type(reward.model).__name__}, whose "
                    f"{name} differs: {theirs.flatten()[:2].tolist()} from it, {ours.flatten()[:2].tolist()} "
                    "from prudent"
                )
