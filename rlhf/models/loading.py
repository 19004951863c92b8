"""Load the reward models, language models and tokenisers that a config names; errors name the config key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ...engine import EnsembleRewardConfig, EnsembleRewardModel, Scorer
from ...engine.own_code import refusing_own_code
from ...engine.weights import reading_weights, refuse_missing
from ..job.files import refuse_mistyped

logger = logging.getLogger(__name__)
_REWARD = "a reward model's folder or hub name"


@contextmanager
def weights_without_bars() -> Iterator[None]:
    """Show no bar whenever weights are read or written, for a job that does so often; transformers does by default."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class LoadedReward:
    """A loaded reward model; its weights are read once.

    key     the config key that named it
    source  the folder or hub name that was read; for a run folder, the model in it
    model   on the CPU; a one-head sequence classifier is converted to an ensemble of one head
    """

    key: str
    source: str
    model: EnsembleRewardModel

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokeniser, read at the first use."""
        return load_tokenizer(self.key, self.source)

    def scorer(self, batch_tokens: int = 4096, max_length: int | None = None, progress: bool = False) -> Scorer:
        """Return a `Scorer` of the model, which is moved to the GPU if there is one."""
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        model = self.model.to(device)
        return Scorer(model, self.tokenizer, batch_tokens=batch_tokens, max_length=max_length, progress=progress)


def load_reward(key: str, name: str, *, dtype: str = "auto", append_eos: bool | None = None) -> LoadedReward:
    """Load an ensemble, or any one-head sequence classifier as an ensemble of one head.

    Args:
        key: the config key that errors name.
        name: folder (also the run folder of `prudent train`) or hub name.
        append_eos: whether the model was trained on plain texts that end with EOS; see `EnsembleRewardConfig`. For a
            classifier, whose config does not record it; an ensemble's does, and another value is refused.

    Raises:
        ValueError: for another kind of model, files that cannot be read, or a model with code of its own.
    """
    source = model_folder(name)
    if isinstance(load_reward_config(key, source, append_eos=append_eos), EnsembleRewardConfig):
        model = _load(key, source, _REWARD, EnsembleRewardModel.from_pretrained, dtype=dtype)
        return LoadedReward(key, source, model)
    convert = EnsembleRewardModel.from_sequence_classifier
    model = _load(key, source, _REWARD, convert, dtype=dtype, append_eos=append_eos)
    return LoadedReward(key, source, model)


def load_reward_config(key: str, name: str, *, append_eos: bool | None = None) -> Any:
    """Return the configuration that `load_reward` would load; ValueError if an ensemble has another `append_eos`."""
    found = load_config(key, name, _REWARD)
    if isinstance(found, EnsembleRewardConfig) and append_eos not in (None, found.append_eos):
        raise ValueError(
            f"append_eos: expected {found.append_eos}, with which {key} {name} was trained, or null, got {append_eos}"
        )
    return found


def says_append_eos(key: str, name: str) -> bool:
    """Return whether a reward model's config records append_eos: an ensemble's does, a classifier's does not."""
    return isinstance(load_reward_config(key, model_folder(name)), EnsembleRewardConfig)


def load_config(key: str, name: str, wanted: str) -> Any:
    """Load the configuration of the model `name`. Errors name the config `key` and say that it expects `wanted`."""
    return _load(key, name, wanted, AutoConfig.from_pretrained)


def load_trunk(key: str, name: str, **options: Any) -> EnsembleRewardModel:
    """Load the language model `name` and put fresh heads on it; `options`: of `EnsembleRewardModel.from_trunk`."""
    wanted = "a language model's folder or hub name"
    model: EnsembleRewardModel = _load(key, name, wanted, EnsembleRewardModel.from_trunk, **options)
    return model


def load_language_model(key: str, name: str, dtype: Any = "auto") -> Any:
    """Load the causal language model `name` on the CPU. Errors name the config `key`.

    Raises:
        ValueError: for another kind of model, missing tensors, or files that cannot be read.
    """
    _refuse_other_kinds(key, name)
    lora = ValueError(
        f"{key}: expected a whole causal language model, got {name}, a LoRA: merge it into its base first "
        "(peft: PeftModel.from_pretrained(base, folder).merge_and_unload())"
    )
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise lora
    load, wanted = AutoModelForCausalLM.from_pretrained, "a causal language model's folder or hub name"
    model, info = _load(key, name, wanted, load, dtype=dtype, output_loading_info=True)
    refuse_missing(key, name, info["missing_keys"])
    if getattr(model, "peft_config", None):  # of a hub: transformers loaded it, and the loop would disable it
        raise lora
    return model


def _refuse_other_kinds(key: str, name: str) -> None:
    """Raise ValueError for a reward model or a family without causal language models.

    transformers' own error would list every family that it knows, in three thousand characters.
    """
    refuse_mistyped(key, name)
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return  # loading reports the error
    if isinstance(found, EnsembleRewardConfig):
        raise ValueError(
            f"{key}: expected a causal language model, got the reward model {name}, which cannot generate text"
        )
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{key}: expected a causal language model, got {name}, of model type {found.model_type}")


def load_tokenizer(key: str, name: str) -> Any:
    """Load the tokeniser of a folder or hub name. Errors name the config `key`."""

    def load(name: str, **options: Any) -> Any:
        try:
            return AutoTokenizer.from_pretrained(name, **options)
        except (OSError, ImportError):
            raise
        except Exception as error:  # tokenizers raises a bare Exception for a file it cannot parse
            if "trust_remote_code" in str(error):
                raise
            missing = "instantiate the backend tokenizer" in str(error)
            raise ValueError("it has none" if missing else f"its tokeniser cannot be read ({error})") from error

    return _load(key, name, "a folder or hub name with a tokeniser", load)


def model_folder(name: Path | str) -> str:
    """Return `name`, or the model in it if it is a run folder of `prudent train`."""
    model = Path(name) / "model"
    is_run = (model / "config.json").is_file() and not (Path(name) / "config.json").exists()
    return str(model if is_run else name)


def _load(key: str, name: str, wanted: str, load: Callable[..., Any], **options: Any) -> Any:
    """Call `load(name)`; turn its errors into one sentence with the key, the name and what it is instead of `wanted`.

    Code that comes with the weights is never run: transformers would ask on standard output and read the answer from
    standard input.
    """
    refuse_mistyped(key, name)
    try:
        with reading_weights(name), refusing_own_code(name):
            return load(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = shorten(str(error), 400)  # transformers lists every family that it knows, in 3000 characters
        ours = reason.removeprefix(f"{name}: ")  # the engine's own error, after the folder or the function
        if reason.startswith(("from_trunk: ", "from_sequence_classifier: ", "EnsembleReward")):
            ours = reason.partition(": ")[2]
        if ours != reason:
            raise ValueError(f"{key}: {name}: {ours}") from error
        if Path(name).is_dir():
            raise ValueError(f"{key}: expected {wanted}, got {_described(name)}: {reason}") from error
        raise ValueError(f"{key}: {name} is neither a folder nor a hub name that loads: {reason}") from error


def _described(name: str) -> str:
    """Describe a folder, and name the model in or beside it that was probably meant."""
    folder, model = Path(name), model_folder(name)
    if model != name:
        return f"{name}, a run folder whose model is {model}"
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return f"the folder {name}"
    merged = f" (the merged model is {folder.parent / 'model'})" if (folder.parent / "model").is_dir() else ""
    return f"{name}, a LoRA without its base model{merged}"
