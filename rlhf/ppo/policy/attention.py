"""Choose the attention implementation: flash-attn if the machine has it, else torch's own."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...job.log import say_once

FLASH = "flash_attention_2"  # transformers' name


class Attention(NamedTuple):
    """name: transformers' name of it. packed: whether batches are packed by default."""

    name: str
    packed: bool


def resolve(attn: str, dtype: torch.dtype, device: torch.device | str) -> Attention:
    """The attention that `attn` (auto, flash, sdpa or eager) stands for on this machine, for a trunk of `dtype`.

    auto is flash-attn on CUDA of compute capability 8.0 or above with a half-precision dtype and the package installed,
    else SDPA. The choice of auto is printed once on stderr, with its reason. Packing is the default only with
    flash-attn: SDPA computes the products between the sequences of a packed row and masks them, which costs more than
    the padding it saves.

    Raises:
        ValueError: if `attn` is flash, which is not available.
    """
    if attn not in ("auto", "flash"):
        return Attention(attn, packed=False)
    missing = _why_no_flash(dtype, torch.device(device))
    if attn == "flash" and missing is not None:
        raise ValueError(f"attn: expected sdpa, eager or auto, because {missing}, got flash")
    if missing is None:
        chosen, reason = Attention(FLASH, packed=True), "flash-attn is installed"
    else:
        chosen, reason = Attention("sdpa", packed=False), missing
    if attn == "auto":
        say_once(f"attention: {chosen.name} ({reason})")
    return chosen


def _why_no_flash(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device and this is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn needs a half precision and the trunk is {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"flash-attn needs compute capability 8.0 and this GPU has {capability[0]}.{capability[1]}"
    if not flash_is_installed():
        return "flash-attn cannot be imported: pip install --no-build-isolation 'prudent[flash]'"
    return None


def flash_is_installed() -> bool:
    """Whether flash_attn is installed, imports (a build for another torch does not) and suits transformers."""
    try:
        import flash_attn  # type: ignore[import-not-found]  # noqa: F401
        from transformers.utils.import_utils import is_flash_attn_2_available

        return bool(is_flash_attn_2_available())
    except (ImportError, ValueError):
        return False
