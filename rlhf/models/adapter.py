"""Save and load a reward as a LoRA with heads, which PPO adds to a policy's trunk; `prudent train` mode lora saves one.

A folder holds a LoRA in peft's format with the causal language model's names (so that PeftModel.from_pretrained can
load it onto that model), the heads (head.safetensors, head.json) and the tokeniser.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...engine import EnsembleHead
from ...engine.weights import reading_weights
from ..job.files import read_json

_WEIGHTS = "adapter_model.safetensors"  # peft's name
_SETTINGS = ("hidden_size", "num_heads", "aggregation", "std_floor", "append_eos")  # required in head.json
_ROOT = "base_model.model."  # peft's prefix of every name in the model that it wraps


@contextmanager
def peft_hushed() -> Iterator[None]:
    """Silence a deprecation warning of transformers 5.23 that peft 0.21 causes and its users cannot fix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def save_lora(
    model: Any, adapter: str, folder: Path, *, base: str | None = None, trunk_prefix: tuple[str, str] | None = None
) -> None:
    """Save one LoRA of a PeftModel in the form that `PeftModel.from_pretrained` reads.

    Args:
        model: the PeftModel.
        adapter: the LoRA's name in the model; it is saved without a name.
        folder: an existing folder.
        base: the base model's name in the saved configuration; None keeps the one that peft found.
        trunk_prefix: (name of the trunk in the wrapped model, name to save it under), if they differ.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if "lora_" in name}
    config = copy.deepcopy(model.peft_config[adapter])
    if trunk_prefix is not None:
        own, saved = (f"{prefix}." for prefix in trunk_prefix)
        state = {_renamed(name, _ROOT + own, _ROOT + saved): tensor for name, tensor in state.items()}
        # whole names; some releases of peft list last components instead, which have no prefix
        config.target_modules = {_renamed(name, own, saved) for name in config.target_modules}
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    config.inference_mode, config.modules_to_save, config.task_type = True, None, "CAUSAL_LM"
    config.base_model_name_or_path = base or config.base_model_name_or_path
    config.save_pretrained(folder)


@torch.no_grad()
def load_lora(model: Any, adapter: str, folder: Path, *, trunk_prefix: tuple[str, str] | None = None) -> None:
    """Set the weights of one LoRA of a PeftModel to those that `save_lora` wrote with the same `trunk_prefix`.

    Raises:
        ValueError: for a folder whose LoRA is of other layers or another rank.
    """
    with reading_weights(folder / _WEIGHTS):
        state = load_file(folder / _WEIGHTS)
    if trunk_prefix is not None:
        own, saved = (f"{prefix}." for prefix in trunk_prefix)
        state = {_renamed(name, _ROOT + saved, _ROOT + own): tensor for name, tensor in state.items()}
    # peft's own loader also asks for the modules_to_save, which `save_lora` leaves out
    named = model.named_parameters()
    wanted = {name.replace(f".{adapter}.", "."): p for name, p in named if "lora_" in name and f".{adapter}." in name}
    for name in sorted(wanted.keys() | state.keys()):
        shapes = [list(store[name].shape) if name in store else "absent" for store in (wanted, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{folder}: expected a LoRA whose {name} is {shapes[0]}, got {shapes[1]}")
        wanted[name].copy_(state[name])


def _renamed(name: str, prefix: str, other: str) -> str:
    return other + name[len(prefix) :] if name.startswith(prefix) else name


def save_head(
    head: EnsembleHead,
    folder: Path,
    *,
    append_eos: bool = True,
    max_score_length: int | None = None,
    taps: list[str] | None = None,
) -> None:
    """Save weights, calibration and settings of an ensemble head as head.safetensors and head.json.

    append_eos, max_score_length, taps: how the heads' training texts were read; see `EnsembleRewardConfig`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / "head.safetensors")
    settings = {
        "hidden_size": head.hidden_size,
        "num_heads": head.num_heads,
        "aggregation": str(head.aggregation),
        "std_floor": head.std_floor,
        "append_eos": append_eos,
        "max_score_length": max_score_length,
        **({} if taps is None else {"taps": taps}),
    }
    (folder / "head.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def is_reward_adapter(folder: Path | str) -> bool:
    """Return whether `folder` holds a LoRA with heads."""
    return all((Path(folder) / name).is_file() for name in ("adapter_config.json", _WEIGHTS, "head.json"))


def adapter_settings(folder: Path | str) -> dict[str, Any]:
    """Read head.json of a folder that `save_head` wrote. Raises ValueError if a setting is missing."""
    folder = Path(folder)
    settings: dict[str, Any] = read_json(folder / "head.json")
    missing = [name for name in _SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"{folder / 'head.json'}: expected {', '.join(_SETTINGS)}, got none for {', '.join(missing)}")
    return settings


def load_head(folder: Path | str) -> EnsembleHead:
    """Load the heads that `save_head` wrote: frozen, in eval mode, on the CPU, in fp32.

    Raises:
        ValueError: for a folder without heads, or with heads that do not fit its settings.
    """
    folder = Path(folder)
    try:
        settings = adapter_settings(folder)
        head = EnsembleHead(
            settings["hidden_size"],
            settings["num_heads"],
            aggregation=settings["aggregation"],
            std_floor=settings["std_floor"],
        )
        with reading_weights(folder / "head.safetensors"):
            head.load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, TypeError) as error:
        raise ValueError(
            f"{folder}: expected head.json and head.safetensors, as `prudent train` with mode lora saves them, "
            f"got {error}"
        ) from error
    return head.requires_grad_(False).eval()
