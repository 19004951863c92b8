"""Put a model in eval mode for a block, then restore the mode of each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on exit, restore each module's own mode.

    It uses no_grad and not inference_mode: autograd could not use tensors that the trunk caches in inference_mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
