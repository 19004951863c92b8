"""Our reward models inside vLLM: a model plugin, and an endpoint plugin with the wire dialects. See docs/vllm.md."""

from __future__ import annotations

ARCHITECTURE = "EnsembleRewardModel"  # as `architectures` in config.json names it


def register() -> None:
    """Tell vLLM of our configuration and model; vLLM calls it in each of its processes (`vllm.general_plugins`).

    The model's own module, which imports much of vLLM, is imported when such a model is loaded.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from ....engine import EnsembleRewardConfig

    AutoConfig.register(EnsembleRewardConfig.model_type, EnsembleRewardConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
