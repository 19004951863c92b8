"""A reward model with uncertainty: one trunk and K Gaussian reward heads. Needs torch and transformers alone.

prudent wrote this file beside the model's weights, for `trust_remote_code=True`; README.md explains the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput


class EnsembleRewardConfig(PreTrainedConfig):
    """See the model's card. append_eos and max_score_length say how the training texts were tokenised."""

    model_type = "prudent_ensemble_reward"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  as transformers reads it
    has_no_defaults_at_init = True
    taps: list[str] | None = None
    logprob_skips: list[int] | None = None

    def __init__(
        self,
        text_config: Any = None,
        num_heads: int = 5,
        aggregation: str = "tradeoff:0.4",
        std_floor: float = 0.0,
        pooling: str = "last",
        append_eos: bool = True,
        max_score_length: int | None = None,
        skip_token_id: int | None = None,
        trust_directions: int | None = None,
        taps: list[str] | None = None,
        logprob_skips: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            fields = dict(text_config)
            text_config = AutoConfig.for_model(fields.pop("model_type", ""), **fields)
        self.num_heads, self.aggregation, self.std_floor, self.pooling = num_heads, aggregation, std_floor, pooling
        self.append_eos, self.max_score_length, self.skip_token_id = append_eos, max_score_length, skip_token_id
        self.trust_directions = trust_directions
        if taps is not None:
            self.taps = taps
        if logprob_skips is not None:
            self.logprob_skips = logprob_skips
        kwargs.setdefault("num_labels", 1)
        super().__init__(**kwargs)
        self.text_config: Any = text_config
        for name in ("attn_implementation", "experts_implementation"):
            if kwargs.get(name) is not None:
                setattr(self, f"_{name}", kwargs[name])


@dataclass
class EnsembleRewardOutput(ModelOutput):
    """logits [B, 1] the reward; mean, std [B, K] of the heads; distance [B], 1 = the edge of 95 % of the reference
    responses, None without a trust region. All fp32; loss is always None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    distance: Tensor | None = None


class EnsembleRewardModel(PreTrainedModel):
    """Token ids to rewards; padding may be on either side, the attention mask says where."""

    config: EnsembleRewardConfig
    config_class = EnsembleRewardConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"score"}  # noqa: RUF012  as transformers reads it

    def __init__(self, config: EnsembleRewardConfig) -> None:
        super().__init__(config)
        self.model: Any = AutoModel.from_config(config.text_config)
        text = config.text_config
        self.taps = [tap.partition(":")[::2] for tap in config.taps or [f"last:{text.num_hidden_layers}"]]
        kinds = [kind for kind, _ in self.taps]
        self.reads_response = kinds.count("last") < len(kinds)
        self.lm_head: nn.Linear | None = None
        if "logprob" in kinds and not getattr(text, "tie_word_embeddings", False):
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.score = Heads(sum(2 if kind == "logprob" else text.hidden_size for kind in kinds), config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        response_start: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> EnsembleRewardOutput | tuple[Tensor, ...]:
        """input_ids, attention_mask [B, T]; response_start [B] int64: the place of each response's first token among
        the attended ones, needed by a model with a tap `mean:LAYER` or `logprob`. Other keywords are ignored."""
        if self.reads_response and response_start is None:
            raise ValueError(f"response_start: expected where each response begins, for {self.config.taps}, got None")
        attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.ne(0)
        order = attended.logical_not().to(torch.int8).argsort(dim=1, stable=True)  # padding to the right
        attended = attended.gather(1, order)
        padding: Any = getattr(self.config.text_config, "pad_token_id", None)
        known = isinstance(padding, int) and 0 <= padding < self.config.text_config.vocab_size
        ids = input_ids.gather(1, order).masked_fill(attended.logical_not(), int(padding) if known else 0)
        options = {"use_cache": False} if self.config.pooling == "last" else {}
        inner = self.config.taps is not None
        output = self.model(
            input_ids=ids, attention_mask=attended.long(), output_hidden_states=inner, return_dict=True, **options
        )
        features = self._features(output, ids, attended, response_start)
        with torch.autocast(features.device.type, enabled=False):
            mean, std, distance = self.score(features)
            reward = self.score.aggregate(mean, std, distance, self.config.aggregation)
        result = EnsembleRewardOutput(logits=reward[:, None], mean=mean, std=std, distance=distance)
        return result.to_tuple() if return_dict is False else result

    @staticmethod
    def _check_start(start: Tensor, attended: Tensor) -> None:
        """On the CPU only: to read device memory would stall the stream."""
        outside = (start < 0) | (start >= attended.sum(1).to(start.device))
        if start.device.type == "cpu" and bool(outside.any()):
            row = int(outside.int().argmax())
            raise ValueError(
                f"response_start: expected the place of an attended token, counted from 0, got {int(start[row])} in "
                f"row {row}"
            )

    def _features(self, output: Any, ids: Tensor, attended: Tensor, start: Tensor | None) -> Any:
        """[B, F] tensor: what the heads read of each row."""
        hidden, place = output.last_hidden_state, torch.arange(ids.shape[1], device=ids.device)
        row = torch.arange(len(ids), device=ids.device)
        if self.config.pooling == "last":
            skipped = self.config.skip_token_id
            read = attended if skipped is None else attended & ids.ne(skipped)
            token = last = torch.where(read, place, 0).amax(1)
        else:
            token, last = torch.zeros_like(row), attended.sum(1) - 1
        if self.config.pooling == "pooler":
            return self.model.pooler(hidden[row, token][:, None])
        parts = []
        for kind, layer in self.taps:
            inner = layer and int(layer) < self.config.text_config.num_hidden_layers
            state = output.hidden_states[int(layer)] if inner else hidden
            if kind == "last":
                parts.append(state[row, token])
                continue
            assert start is not None
            self._check_start(start, attended)
            response = (place >= torch.minimum(start, last)[:, None]) & (place <= last[:, None])
            if kind == "logprob":
                parts.append(self._logprob(hidden, ids, response))
                continue
            share = response.float() / response.sum(dim=1, keepdim=True)
            parts.append(torch.einsum("bt,btd->bd", share, state.float()))
        return torch.cat([part.to(hidden.dtype) for part in parts], dim=1)

    def _logprob(self, hidden: Tensor, ids: Tensor, response: Tensor) -> Tensor:
        """[B, 2]: the mean and the least log-probability of the response's tokens under the language model, in nats."""
        skipped = torch.tensor(self.config.logprob_skips or [], dtype=ids.dtype, device=ids.device)
        read = response & ~torch.isin(ids, skipped)
        read[:, 0] = False  # nothing predicts the first token
        row, place = read.nonzero(as_tuple=True)
        before, weight = hidden[row, place - 1].float(), self._head_weight()
        total = before.new_full((len(row),), float("-inf"))
        for part in weight.split(8192):  # bounds the memory: never all logits at once
            total = torch.logaddexp(total, self._logits(before @ part.float().T).logsumexp(1))
        target = self._logits((before * weight[ids[row, place]].float()).sum(1))
        found = torch.zeros_like(read, dtype=torch.float32)
        found[row, place] = target - total
        counts = read.sum(1)
        least = torch.where(read, found, float("inf")).amin(1)
        return torch.stack([found.sum(1) / counts.clamp_min(1), torch.where(counts > 0, least, 0.0)], dim=1)

    def _head_weight(self) -> Any:
        return (self.model.get_input_embeddings() if self.lm_head is None else self.lm_head).weight

    def _logits(self, z: Tensor) -> Tensor:
        """The scale or the cap of the language model's logits, under every name that configurations use."""
        text = self.config.text_config
        cap = getattr(text, "final_logit_softcapping", None)
        scale = (getattr(text, "logit_scale", None) or 1.0) * (getattr(text, "lm_head_multiplier", None) or 1.0)
        z = z * (scale / (getattr(text, "logits_scaling", None) or 1.0))
        return z if cap is None else cap * torch.tanh(z / cap)


class Heads(nn.Module):
    """Features [B, F] -> means and stds [B, K], distance [B]; fp32."""

    shift: Tensor
    scale: Tensor
    std_ref: Tensor
    trust_mean: Tensor
    trust_precision: Tensor
    trust_directions: Tensor
    trust_weights: Tensor
    trust_unit: Tensor

    def __init__(self, width: int, config: EnsembleRewardConfig) -> None:
        super().__init__()
        self.num_heads, self.std_floor = config.num_heads, config.std_floor
        k, fp32 = config.num_heads, torch.float32
        self.weight = nn.Parameter(torch.zeros(2 * k, width, dtype=fp32))
        self.bias = nn.Parameter(torch.zeros(2 * k, dtype=fp32))
        sizes = {"shift": [k], "scale": [k], "std_ref": [k]}
        if config.trust_directions is not None:
            r = config.trust_directions
            sizes |= {"trust_mean": [width], "trust_precision": [width], "trust_directions": [r, width]}
            sizes |= {"trust_weights": [r], "trust_unit": [1], "trust_rms": [1]}
        for name, size in sizes.items():
            self.register_buffer(name, torch.ones(size, dtype=fp32))
        self.measures = config.trust_directions is not None

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        f, k = features.float(), self.num_heads
        z = F.linear(f, self.weight.float(), self.bias.float())
        mean, std = (z[:, :k] - self.shift) / self.scale, (F.softplus(z[:, k:]) + self.std_floor) / self.scale
        if not self.measures:
            return mean, std, None
        gap = f - self.trust_mean
        along = gap @ self.trust_directions.T
        squared = (self.trust_precision * gap.square()).sum(1) + (self.trust_weights * along.square()).sum(1)
        return mean, std, squared.clamp_min(0).sqrt()

    def aggregate(self, mean: Tensor, std: Tensor, distance: Tensor | None, aggregation: str) -> Tensor:
        """[B]: the rewards under an aggregation, written as `kind:number,name=value,...`."""
        kind, *rest = aggregation.split(",")
        kind, _, number = kind.partition(":")
        options = dict(option.split("=") for option in rest)
        if kind == "trust":
            kind, options["trust"] = "mean", number
        if kind == "batch_worst" or {"centre", "worst"} & {*options}:
            raise ValueError(f"aggregation: expected one that scores each row by itself, got {aggregation!r}")
        nominal = self._nominal(options.get("nominal", "least_std"), mean, std)
        reward, price = _combined(kind, float(number or 0), mean, nominal), float(options.get("trust", 0))
        if not price:
            return reward
        if distance is None:
            raise ValueError(f"aggregation: expected a model with a trust region for {aggregation!r}, got one without")
        beyond = (distance - float(options.get("from", 0))).clamp_min(0) ** int(options.get("power", 2))
        return reward - price * self.trust_unit * beyond

    def _nominal(self, which: str, mean: Tensor, std: Tensor) -> Tensor:
        """[B]: the mean of the head that is surest."""
        if which == "mean":
            return mean.mean(1)
        if which.startswith("head:"):
            return mean[:, int(which[5:])]
        surest = (std / self.std_ref if which == "relative_std" else std).argmin(1)
        return mean.gather(1, surest[:, None])[:, 0]


def _combined(kind: str, c: float, mean: Tensor, nominal: Tensor) -> Tensor:
    """The means [B, K] and their nominal one [B] -> [B]; kernels/ensemble_reward/spec.py of prudent has the table."""
    ranked, k = mean.sort(dim=1).values, mean.shape[1]
    if kind in ("tradeoff", "nominal"):
        return nominal if kind == "nominal" else c * nominal + (1 - c) * ranked[:, 0]
    if kind == "softmin":
        return -c * (torch.logsumexp(-mean / c, dim=1) - math.log(k))
    if kind == "cvar":
        return ranked[:, : max(1, math.ceil(c * k - 1e-9))].mean(1)
    if kind == "head":
        return mean[:, int(c)]
    if kind in ("lcb", "uwo"):
        variance = mean.var(dim=1, correction=0)
        return mean.mean(1) - c * (variance.sqrt() if kind == "lcb" else variance)
    middle = (ranked[:, (k - 1) // 2] + ranked[:, k // 2]) / 2
    return {"mean": mean.mean(1), "min": ranked[:, 0], "max": ranked[:, -1], "median": middle}[kind]
