"""Several LoRAs on one trunk: added once, switched without a copy, computed in the trunk's own precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ....engine.weights import reading_weights
from ...models.adapter import save_lora
from ..config import PolicyConfig


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'prudent[train]'") from None
    return peft


class StoredWide(nn.Linear):
    """A LoRA's linear layer: stored in fp32, multiplied in its input's dtype.

    peft casts the input to fp32 instead and keeps that copy for the backward pass: four bytes per feature and token at
    every adapted layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


class Adapters:
    """The LoRAs of one causal language model, which is changed in place; none is active at first.

    Args:
        model: the causal language model; its own weights are frozen.
        name: the model's name in messages and in peft's adapter_config.json.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self._name = model, name
        self._peft: Any = None
        self._layers: list[Any] = []
        self._half: dict[nn.Module, nn.Parameter] = {}
        self.active: str | None = None

    def add(self, adapter: str, config: PolicyConfig) -> None:
        """Add a fresh LoRA to every linear layer but the language-model head; it changes nothing yet (B = 0)."""
        lora = _peft().LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self._inject(adapter, lora)

    def load(self, adapter: str, folder: Path) -> None:
        """Load the LoRA in `folder`, frozen.

        Raises:
            ValueError: if it cannot be read, or if its tensors do not fit the model; it names one.
        """
        peft = _peft()
        wanted = f"reward.source: expected an adapter that fits {self._name}, got {folder}"
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.base_model_name_or_path = None  # the model here is used, whatever its name
            self._inject(adapter, config)
            weights = folder / "adapter_model.safetensors"
            with reading_weights(weights):
                saved = load_file(weights)
            own = peft.get_peft_model_state_dict(self._peft, adapter_name=adapter, save_embedding_layers=False)
            for name in sorted(own.keys() ^ saved.keys()):
                raise ValueError(f"{name} is in only one of them")
            peft.set_peft_model_state_dict(self._peft, saved, adapter_name=adapter)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{wanted}: {_first_tensor(str(error))}") from error

    def _inject(self, adapter: str, config: Any) -> None:
        if self._peft is None:
            self._peft = _peft().get_peft_model(self.model, config, adapter_name=adapter)
        else:
            self._peft.add_adapter(adapter, config)
        self._prepare()

    def _prepare(self) -> None:
        self._peft.requires_grad_(False)
        self._layers = [module for module in self._peft.modules() if isinstance(module, _peft().tuners.lora.LoraLayer)]
        for layer in self._layers:
            layer.cast_input_dtype_enabled = False
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                if type(linear) is nn.Linear:
                    linear.__class__ = StoredWide
        self.use(None)

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The LoRA's parameters by their names in `model`."""
        mark = f".{adapter}."
        return {n: p for n, p in self.model.named_parameters() if "lora_" in n and mark in f"{n}."}

    def use(self, adapter: str | None) -> None:
        """Switch to one LoRA, or to none.

        peft's own switches also set requires_grad, so that a backward pass through two LoRAs would lose the gradient of
        the one that is off when it runs.
        """
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self.active = adapter

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """`use` for the length of a block."""
        before = self.active
        if adapter == before:
            yield
            return
        self.use(adapter)
        try:
            yield
        finally:
            self.use(before)

    @contextmanager
    def in_dtype(self, adapter: str, dtype: torch.dtype) -> Iterator[None]:
        """Replace the LoRA's weights by copies in `dtype` for a block without gradient, to save a cast for each token.

        The copies have the same addresses every time, so that a captured CUDA graph stays valid.
        """
        linears = [
            linear
            for layer in self._layers
            for part in (layer.lora_A, layer.lora_B)
            for name, linear in part.items()
            if name == adapter and linear.weight.dtype != dtype
        ]
        wide = [linear.weight for linear in linears]
        for linear, weight in zip(linears, wide, strict=True):
            copy = self._half.setdefault(
                linear, nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
            )
            with torch.no_grad():
                copy.copy_(weight)
            linear.weight = copy
        try:
            yield
        finally:
            for linear, weight in zip(linears, wide, strict=True):
                linear.weight = weight

    def save(self, adapter: str, folder: Path) -> None:
        """Save in peft's format: `PeftModel.from_pretrained(base model, folder)` loads it."""
        save_lora(self._peft, adapter, folder, base=self._name)


def _first_tensor(message: str) -> str:
    """The first line of torch's list of tensors that do not fit, which follows a heading."""
    lines = message.splitlines()
    return lines[min(1, len(lines) - 1)].strip() if lines else "it cannot be read"
