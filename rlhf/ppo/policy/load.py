"""Load the causal language model that a policy is made of."""

from __future__ import annotations

from typing import Any

import torch

from ...models.loading import load_language_model
from ..config import PPOConfig
from .precision import cast, trunk_dtype


def load_model(config: PPOConfig, device: torch.device, given: Any = None) -> Any:
    """Load `config.model` on the CPU in the dtype for `device`; or return `given`, a model that is loaded already.

    `given` keeps its dtype if `config.dtype` is auto, and is changed in place otherwise.

    Raises:
        ValueError: for a model that cannot be loaded or used.
    """
    if given is None:
        return load_language_model("model", config.model, trunk_dtype(config, device))
    return given if config.dtype == "auto" else cast(given, trunk_dtype(config, device))
