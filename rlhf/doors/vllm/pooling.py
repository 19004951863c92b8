"""vLLM's pooling for models that read more than the last token's state. Imported by vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.seqwise import SequencePoolingMethod

from ....engine import EnsembleRewardConfig
from ....engine.likelihood import LanguageHead, LogitRule
from . import taps

START = "response_start"  # in PoolingParams.extra_kwargs: the place of the response's first token


class TapPool(SequencePoolingMethod):  # type: ignore[misc]
    """States [T, C D] of a batch of requests -> features [N, F].

    A request gets NaN while it is unfinished, which vLLM drops, and if vLLM had a token of its response in the prefix
    cache: the endpoints then ask once more without the cache. A request without START is a response from its first
    token on, as token ids are for `Scorer`.

    Args:
        config: of the model.
        layers: `taps.inner_layers`, in the order of their columns.
        weight: [V, D] of the language-model head, for the tap logprob.
    """

    def __init__(self, config: EnsembleRewardConfig, layers: tuple[int, ...], weight: Tensor | None) -> None:
        super().__init__()
        self.taps, self.layers, self.size = config.parsed_taps(), layers, config.feature_size
        self.reads_response, self.skipped = config.reads_response, config.skip_token_id
        self.head: LanguageHead | None = None
        if weight is not None:
            rule = LogitRule.of(config.text_config, config.text_config.model_type)
            self.head = LanguageHead(weight, rule, config.logprob_skips or ())

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> Tensor:
        cursor = pooling_metadata.get_pooling_cursor()
        counts = cursor.num_scheduled_tokens_cpu.tolist()
        columns = zip(
            hidden_states.split(counts),
            counts,
            cursor.seq_lens_cpu.tolist(),
            pooling_metadata.prompt_lens.tolist(),
            pooling_metadata.get_prompt_token_ids_cpu(),
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            strict=True,
        )
        pooled = hidden_states.new_full((len(counts), self.size), float("nan"))
        for row, (states, count, seen, length, ids, params, state) in enumerate(columns):
            ids = torch.nn.functional.pad(ids, (0, length - len(ids)))  # vLLM's trial run gives too few
            start = (params.extra_kwargs or {}).get(START, 0) if self.reads_response else None
            span = taps.span_of(ids.tolist(), start, self.skipped, logprob=self.head is not None)
            kept: taps.Kept = state.hidden_states_cache
            taps.keep(kept, seen - count, states, span)
            if seen == length:
                whole = taps.gathered(kept, span)
                state.clean()
                if whole is not None:
                    pooled[row] = taps.read(self.taps, self.layers, whole, ids, span, self.head)
        return pooled
