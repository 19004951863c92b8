"""The model class that vLLM loads: its own trunk, our head. Imported by vLLM, in the process that holds the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import SequencePooler, get_seq_pooling_method
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import maybe_prefix

from ....engine import EnsembleRewardConfig
from ....engine.taps import layers_of
from . import contract, taps, versions
from .pooling import TapPool


class EnsembleRewardModel(nn.Module):
    """`prudent.EnsembleRewardModel` as a pooling model of vLLM.

    A request's output is `contract.vectors`: [means K, stds K, distance if the model measures it, reward].

    Raises:
        ValueError: for a model that vLLM would score differently, or a trunk that vLLM does not have.
    """

    is_pooling_model = True
    default_seq_pooling_type = "LAST"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        versions.check()
        config: EnsembleRewardConfig = vllm_config.model_config.hf_config
        contract.check_servable(config, vllm_config.model_config.max_model_len)
        self.config = config
        self.layers = taps.inner_layers(config.parsed_taps(), layers_of(config.text_config))
        inner = vllm_config.with_hf_config(config.text_config, architectures=[contract.causal_class(config)])
        trunk = versions.trunk_class(inner.model_config, inner_layers=bool(self.layers))
        self.model = initialize_model(inner, prefix=maybe_prefix(prefix, "model"), model_class=trunk)
        if self.layers:
            self.model.set_aux_hidden_state_layers(self.layers)
        self.score = contract.new_head(config)
        self.lm_head: nn.Parameter | None = None
        if config.reads_logprob:  # vLLM pads its own, and splits it between GPUs
            size = (config.text_config.vocab_size, config.text_config.hidden_size)
            self.lm_head = nn.Parameter(torch.empty(size), requires_grad=False)
        pooling = get_seq_pooling_method("LAST")
        if config.taps is not None or config.skip_token_id is not None:
            pooling = TapPool(config, self.layers, self.lm_head)
        self.pooler = DispatchPooler({"classify": SequencePooler(pooling, self._scored)})

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        return self.model.embed_input_ids(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """[T] -> hidden states [T, D] after the trunk's final norm; with taps [T, C D], the inner layers' behind."""
        output = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        if not self.layers:
            return output
        last, inner = output
        return torch.cat([last, *inner], dim=1)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of `prudent.EnsembleRewardModel`; return the names of what was loaded."""
        head: dict[str, Tensor] = {}
        named = contract.split_weights(weights, head, contract.causal_prefix(self.config), self.lm_head)
        loaded = {f"model.{name}" for name in self.model.load_weights(named)}
        return loaded | contract.load_head(self.score, head) | ({"lm_head"} if self.lm_head is not None else set())

    @torch.inference_mode()
    def _scored(self, pooled: Tensor | list[Tensor], _: Any) -> Tensor:
        """Features [N, F] -> [N, 2K + 1] or [N, 2K + 2]."""
        hidden = torch.stack(pooled) if isinstance(pooled, list) else pooled
        return contract.vectors(self.score(hidden))
