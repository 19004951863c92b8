"""What differs between releases of vLLM, and what is not its public interface. Read in the wheels 0.29.0 to 0.33.0.

0.29 to 0.33   the same: `vllm.general_plugins`, `vllm.endpoint_plugins`, `initialize_model(model_class=)`,
               `VllmConfig.with_hf_config`, `as_embedding_model`, `PoolingMetadata`, `EngineClient.encode`,
               `PoolingParams` with extra_kwargs and skip_reading_prefix_cache, `set_aux_hidden_state_layers`
0.29 to 0.31   a plugin's route is added behind vLLM's own of the same path, which then answers; so the endpoints
               remove vLLM's own
0.32, 0.33     it replaces vLLM's own
"""

from __future__ import annotations

from typing import Any

from packaging.version import Version
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.interfaces import (
    has_inner_state,
    is_attention_free,
    is_hybrid,
    supports_eagle3,
    supports_multimodal,
)

from . import contract

OLDEST = "0.29"
# vLLM has no code of its own for these, and runs transformers'. The rewards of another that it runs so (GPT-NeoX in
# 0.32) were wrong, so only those that a test compares are served.
_BY_TRANSFORMERS = frozenset({"Olmo2ForCausalLM"})


def check() -> None:
    """Raise ValueError for a release that is older than those that were read."""
    from vllm import __version__

    if Version(__version__).release < Version(OLDEST).release:
        raise ValueError(f"vllm: expected {OLDEST} or later, got {__version__}: pip install --upgrade prudent[vllm]")


def trunk_class(model_config: Any, *, inner_layers: bool) -> Any:
    """vLLM's class of the causal language model that `model_config` names, without its language-model head.

    inner_layers: whether the states of layers within the trunk are wanted. The families that vLLM speculates for with
    EAGLE-3 can give them: Llama, Mistral, Qwen2, Qwen3 and others.

    Raises:
        ValueError: for a family that vLLM does not have, or that asks more of vLLM than one attention cache: it decides
            by the outer model's class, which is ours, how to cache and which settings to change.
    """
    (name,) = model_config.hf_config.architectures
    if name not in ModelRegistry.get_supported_archs():
        contract.refuse_family(name, "which this release does not know")
    kind, _ = ModelRegistry.resolve_model_cls([name], model_config=model_config)
    if kind.__module__.startswith("vllm.model_executor.models.transformers") and name not in _BY_TRANSFORMERS:
        contract.refuse_family(name, "which vLLM has no code for and runs with transformers' code")
    if is_hybrid(kind) or is_attention_free(kind) or has_inner_state(kind):
        contract.refuse_family(name, "which caches a recurrent state")
    if supports_multimodal(kind):
        contract.refuse_family(name, "which reads more than text")
    if name in MODELS_CONFIG_MAP:
        contract.refuse_family(name, "for which vLLM changes its settings by the model's name")
    if inner_layers and not supports_eagle3(kind):
        contract.refuse_family(name, "of which it does not give the states of inner layers: train with features=last")
    return as_embedding_model(kind)
