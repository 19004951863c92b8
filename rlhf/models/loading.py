"""Load the reward models, language models and tokenisers that a config names; errors name the config key."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...engine import EnsembleRewardConfig, EnsembleRewardModel, Scorer
from ...engine.own_code import refusing_own_code
from ...engine.weights import reading_weights, refuse_missing
from ..job.files import refuse_mistyped

logger = logging.getLogger(__name__)
_REWARD = "a reward model's folder or hub name"


@dataclass(frozen=True)
class LoadedReward:
    """A reward model, its weights read once, and what its folder turned out to hold.

    key     the config key that named it
    source  the folder or hub name that was read: of a run folder, the model in it
    kind    ensemble: an `EnsembleRewardModel`; classifier: a one-head sequence classifier, made one of one head
    model   on the CPU
    """

    key: str
    source: str
    kind: Literal["ensemble", "classifier"]
    model: EnsembleRewardModel

    @cached_property
    def tokenizer(self) -> Any:
        """The tokeniser beside the model, read at the first use."""
        return load_tokenizer(self.key, self.source)

    def scorer(self, batch_tokens: int = 4096, max_length: int | None = None, progress: bool = False) -> Scorer:
        """A `Scorer` of the model, which goes to the GPU if there is one."""
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        model = self.model.to(device)
        return Scorer(model, self.tokenizer, batch_tokens=batch_tokens, max_length=max_length, progress=progress)


def load_reward(key: str, name: str, *, dtype: str = "auto", append_eos: bool | None = None) -> LoadedReward:
    """Load an ensemble as it is, or anybody's one-head sequence classifier as a model of one head.

    Args:
        key: the config's, for errors.
        name: folder (also the run folder of `prudent train`) or hub name.
        append_eos: whether the model was trained on plain texts that end with EOS; see `EnsembleRewardConfig`. For a
            classifier, which does not say; an ensemble says, and another value is refused.

    Raises:
        ValueError: in one sentence, for another kind of model, files that cannot be read, or code of its own.
    """
    source = model_folder(name)
    found = load_reward_config(key, source)
    if isinstance(found, EnsembleRewardConfig):
        if append_eos not in (None, found.append_eos):
            raise ValueError(
                f"append_eos: expected {found.append_eos}, as {key} {source} was trained with, or nothing, "
                f"got {append_eos}"
            )
        model = _load(key, source, _REWARD, EnsembleRewardModel.from_pretrained, dtype=dtype)
        return LoadedReward(key, source, "ensemble", model)
    convert = EnsembleRewardModel.from_sequence_classifier
    model = _load(key, source, _REWARD, convert, dtype=dtype, append_eos=append_eos)
    return LoadedReward(key, source, "classifier", model)


def load_reward_model(
    key: str, name: str, *, dtype: str = "auto", append_eos: bool | None = None
) -> EnsembleRewardModel:
    """The model of `load_reward`."""
    return load_reward(key, name, dtype=dtype, append_eos=append_eos).model


def load_scorer(
    model: str,
    batch_tokens: int,
    max_length: int | None,
    progress: bool,
    *,
    key: str = "model",
    append_eos: bool | None = None,
) -> Scorer:
    """The scorer of `load_reward`."""
    return load_reward(key, model, append_eos=append_eos).scorer(batch_tokens, max_length, progress)


def load_reward_config(key: str, name: str) -> Any:
    """The configuration of what `load_reward` would load."""
    return load_config(key, name, _REWARD)


def says_append_eos(key: str, name: str) -> bool:
    """Whether a reward model says if its texts end with EOS: an ensemble does, a sequence classifier does not."""
    return isinstance(load_reward_config(key, model_folder(name)), EnsembleRewardConfig)


def load_config(key: str, name: str, wanted: str) -> Any:
    """A model's configuration, which the config's `key` gave; `wanted` says in errors what the key asks for."""
    return _load(key, name, wanted, AutoConfig.from_pretrained)


def load_trunk(key: str, name: str, **options: Any) -> EnsembleRewardModel:
    """Fresh heads on a language model, which the config's `key` gave; `options` as `EnsembleRewardModel.from_trunk`."""
    wanted = "a language model's folder or hub name"
    model: EnsembleRewardModel = _load(key, name, wanted, EnsembleRewardModel.from_trunk, **options)
    return model


def load_language_model(key: str, name: str, dtype: Any = "auto") -> Any:
    """A causal language model on the CPU, which the config's `key` gave.

    Raises:
        ValueError: in one sentence, for another kind of model, missing tensors, or files that cannot be read.
    """
    _refuse_other_kinds(key, name)
    load, wanted = AutoModelForCausalLM.from_pretrained, "a causal language model's folder or hub name"
    model, info = _load(key, name, wanted, load, dtype=dtype, output_loading_info=True)
    refuse_missing(key, name, info["missing_keys"])
    if getattr(model, "peft_config", None):  # transformers added the LoRA; the loop would switch it off with its own
        raise ValueError(
            f"{key}: expected a whole causal language model, got {name}, a LoRA: merge it into its base first "
            "(peft: PeftModel.from_pretrained(base, folder).merge_and_unload())"
        )
    return model


def _refuse_other_kinds(key: str, name: str) -> None:
    """Raise ValueError for a reward model or a family without causal language models.

    transformers would list every family that it knows, three thousand characters of them.
    """
    refuse_mistyped(key, name)
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return  # loading says what is wrong with it
    if isinstance(found, EnsembleRewardConfig):
        raise ValueError(
            f"{key}: expected a causal language model, got the reward model {name}, which scores texts and writes none"
        )
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{key}: expected a causal language model, got {name}, of model type {found.model_type}")


def load_tokenizer(key: str, name: str) -> Any:
    """The tokeniser of a folder or hub name, which the config's `key` gave."""

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
    """`name`, or the model in it where it is a run folder of `prudent train`."""
    model = Path(name) / "model"
    is_run = (model / "config.json").is_file() and not (Path(name) / "config.json").exists()
    return str(model if is_run else name)


def _load(key: str, name: str, wanted: str, load: Callable[..., Any], **options: Any) -> Any:
    """Call `load(name)`; turn its errors into one sentence with the key, the name and what it is instead of `wanted`.

    Code beside the weights is never run: transformers would ask on standard output and read the answer from standard
    input.
    """
    refuse_mistyped(key, name)
    try:
        with reading_weights(name), refusing_own_code(name):
            return load(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = shorten(str(error), 400)  # transformers lists every family that it knows, 3000 characters of them
        ours = reason.removeprefix(f"{name}: ")  # the engine's own sentence, after the folder or the function
        if reason.startswith(("from_trunk: ", "from_sequence_classifier: ", "EnsembleReward")):
            ours = reason.partition(": ")[2]
        if ours != reason:
            raise ValueError(f"{key}: {name}: {ours}") from error
        if Path(name).is_dir():
            raise ValueError(f"{key}: expected {wanted}, got {_described(name)}: {reason}") from error
        raise ValueError(f"{key}: {name} is neither a folder nor a hub name that loads: {reason}") from error


def _described(name: str) -> str:
    """A folder in words, with the model that may have been meant instead."""
    folder, model = Path(name), model_folder(name)
    if model != name:
        return f"{name}, a run folder whose model is {model}"
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return f"the folder {name}"
    merged = f" (merged, it is {folder.parent / 'model'})" if (folder.parent / "model").is_dir() else ""
    return f"{name}, a LoRA without the model that it changes{merged}"
