"""Models that a config names: loaded, or said in one sentence not to be what its key asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...engine import EnsembleRewardConfig, EnsembleRewardModel, Scorer
from ...engine.weights import reading_weights, refuse_missing
from ..job.files import refuse_mistyped

logger = logging.getLogger(__name__)


def load_reward_model(
    key: str, name: str, *, dtype: str = "auto", append_eos: bool | None = None
) -> EnsembleRewardModel:
    """An ensemble as it is, or anybody's one-head sequence classifier as a model of one head.

    Args:
        key: the config's, for errors.
        name: folder or hub name.
        append_eos: of a classifier, which does not say; see `EnsembleRewardConfig`.

    Raises:
        ValueError: in one sentence, for whatever is no reward model, or cannot be read.
    """
    wanted = "a reward model's folder or hub name"
    if isinstance(load_reward_config(key, name), EnsembleRewardConfig):
        ensemble: EnsembleRewardModel = _load(key, name, wanted, EnsembleRewardModel.from_pretrained, dtype=dtype)
        return ensemble
    classifier = EnsembleRewardModel.from_sequence_classifier
    model: EnsembleRewardModel = _load(key, name, wanted, classifier, dtype=dtype, append_eos=append_eos)
    return model


def load_reward_config(key: str, name: str) -> Any:
    """The configuration of what `load_reward_model` would load."""
    return _load(key, name, "a reward model's folder or hub name", AutoConfig.from_pretrained)


def load_trunk(key: str, name: str, **options: Any) -> EnsembleRewardModel:
    """Fresh heads on a language model, which the config's `key` gave; `options` as `EnsembleRewardModel.from_trunk`."""
    wanted = "a language model's folder or hub name"
    model: EnsembleRewardModel = _load(key, name, wanted, EnsembleRewardModel.from_trunk, **options)
    return model


def load_language_model(key: str, name: str, dtype: Any = "auto") -> Any:
    """A causal language model on the CPU, which the config's `key` gave.

    Raises:
        ValueError: in one sentence, for what is none, lacks tensors, or cannot be read.
    """
    _refuse_other_kinds(key, name)
    load, wanted = AutoModelForCausalLM.from_pretrained, "a causal language model's folder or hub name"
    model, info = _load(key, name, wanted, load, dtype=dtype, output_loading_info=True)
    refuse_missing(key, name, info["missing_keys"])
    if getattr(model, "peft_config", None):  # transformers put it on; as one LoRA among the loop's it would be off
        raise ValueError(
            f"{key}: expected a whole causal language model, got {name}, a LoRA: merge it into its base first "
            "(peft: PeftModel.from_pretrained(base, folder).merge_and_unload())"
        )
    return model


def _refuse_other_kinds(key: str, name: str) -> None:
    """transformers lists every family that it knows, three thousand characters of them."""
    refuse_mistyped(key, name)
    try:
        found = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return  # loading says what is wrong with it
    if isinstance(found, EnsembleRewardConfig):
        raise ValueError(
            f"{key}: expected a causal language model, got the reward model {name}, which scores texts and writes none"
        )
    own_code = "AutoModelForCausalLM" in getattr(found, "auto_map", {})
    if type(found) not in AutoModelForCausalLM._model_mapping and not own_code:
        raise ValueError(f"{key}: expected a causal language model, got {name}, of model type {found.model_type}")


def load_tokenizer(key: str, name: str) -> Any:
    """The tokeniser of a folder or hub name, which the config's `key` gave."""

    def load(name: str) -> Any:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ImportError):
            raise
        except Exception as error:  # a bare one, in the library below, for a file that is not what it reads
            missing = "instantiate the backend tokenizer" in str(error)
            raise ValueError("it has none" if missing else f"its tokeniser cannot be read ({error})") from error

    return _load(key, name, "a folder or hub name with a tokeniser", load)


def model_folder(name: Path | str) -> str:
    """`name`, or the model in it where it is a run folder of `prudent train`."""
    model = Path(name) / "model"
    is_run = (model / "config.json").is_file() and not (Path(name) / "config.json").exists()
    return str(model if is_run else name)


def _load(key: str, name: str, wanted: str, load: Callable[..., Any], **options: Any) -> Any:
    """`load(name)`, whose errors become one sentence with the key, the name and what it is instead of `wanted`."""
    refuse_mistyped(key, name)
    try:
        with reading_weights(name):
            return load(name, **options)
    except (OSError, ValueError) as error:
        reason = shorten(str(error), 400)  # transformers lists every family that it knows, 3000 characters of them
        ours = reason.removeprefix(f"{name}: ")  # whole sentences of the engine, behind the folder or the function
        if reason.startswith(("from_trunk: ", "from_sequence_classifier: ", "EnsembleRewardModel")):
            ours = reason.partition(": ")[2]
        if ours != reason:
            raise ValueError(f"{key}: {name}: {ours}") from error
        if Path(name).is_dir():
            raise ValueError(f"{key}: expected {wanted}, got {_described(name)}: {reason}") from error
        raise ValueError(f"{key}: {name} is neither a folder nor a hub name that loads: {reason}") from error


def _described(name: str) -> str:
    """A folder, and where the model is that may have been meant."""
    folder, model = Path(name), model_folder(name)
    if model != name:
        return f"{name}, a run folder whose model is {model}"
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return f"the folder {name}"
    merged = f" (merged, it is {folder.parent / 'model'})" if (folder.parent / "model").is_dir() else ""
    return f"{name}, a LoRA without the model that it changes{merged}"


def load_scorer(model: str, batch_tokens: int, max_length: int | None, progress: bool, *, key: str = "model") -> Scorer:
    """A `Scorer` for an ensemble, a run folder that holds one, or anybody's one-head sequence classifier, on the GPU if
    there is one. ValueError, with the config's `key`, for anything else."""
    folder = model_folder(model)
    loaded, tokenizer = load_reward_model(key, folder), load_tokenizer(key, folder)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return Scorer(loaded.to(device), tokenizer, batch_tokens=batch_tokens, max_length=max_length, progress=progress)
