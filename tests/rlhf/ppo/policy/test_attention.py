"""The choice of attention: flash-attn if device, dtype, GPU and package allow it, else SDPA; told once."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from prudent.rlhf.ppo.policy import attention
from prudent.rlhf.ppo.policy.attention import FLASH, Attention, resolve


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "flash_is_installed", lambda: True)


def test_auto_is_flash_and_packed_where_everything_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve("auto", torch.bfloat16, "cuda") == Attention(FLASH, packed=True)
    assert "attention: flash_attention_2 (flash-attn is installed)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "installed", "reason"),
    [
        (torch.bfloat16, "cpu", (9, 0), True, "needs a CUDA device and this is cpu"),
        (torch.float32, "cuda", (9, 0), True, "needs a half precision and the trunk is float32"),
        (torch.float16, "cuda", (7, 5), True, "needs compute capability 8.0 and this GPU has 7.5"),
        (torch.bfloat16, "cuda", (8, 0), False, r"cannot be imported: .*prudent\[flash\]'"),
    ],
)
def test_auto_is_sdpa_and_padded_where_one_thing_is_missing_and_flash_is_refused(
    dtype: torch.dtype,
    device: str,
    capability: tuple[int, int],
    installed: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "flash_is_installed", lambda: installed)
    assert resolve("auto", dtype, device) == Attention("sdpa", packed=False)
    assert resolve("auto", dtype, device) == Attention("sdpa", packed=False)
    assert capsys.readouterr().err.count("attention: sdpa") == 1  # said once
    with pytest.raises(ValueError, match=f"attn: expected sdpa, eager or auto, because .*{reason}, got flash"):
        resolve("flash", dtype, device)


def test_flash_that_is_there_is_given_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve("flash", torch.float16, "cuda") == Attention(FLASH, packed=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_named_attention_is_used(name: str) -> None:
    assert resolve(name, torch.bfloat16, "cuda") == Attention(name, packed=False)


def test_a_package_that_does_not_import_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # import raises ImportError
    assert not attention.flash_is_installed()


def test_a_package_that_transformers_does_not_take_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # no distribution, no version
    assert not attention.flash_is_installed()
