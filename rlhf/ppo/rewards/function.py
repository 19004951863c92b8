"""Rewards of a Python function."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..batch import Samples
from .answers import rewards_of
from .sources import Rewards, Texts


class CallableReward:
    """MODULE:FUNCTION or FILE.py:FUNCTION, called with a list of prompts and a list of responses.

    A prompt is a text, or a list of messages where the run's prompts are; a response is a text. The answer is a list,
    array or tensor of N numbers, None or NaN where there is none; or a mapping with `rewards` and, where it has them,
    `nominal`, `worst` (N numbers each), `mean` and `std` (N lists of K).

    Args:
        key: of the config, for errors.
        source: what to call.
        texts: prompts and the policy's tokeniser.

    Raises:
        ValueError: for a function that is not there; from a call, for what the function raised or gave.
    """

    num_heads: int | None = None

    def __init__(self, key: str, source: str, texts: Texts) -> None:
        self.name, self._key, self._texts = source, key, texts
        self._function = _function(key, source)

    def __call__(self, samples: Samples) -> Rewards:
        """See `RewardSource`."""
        try:
            answer = self._function(self._texts.asked(samples), self._texts.said(samples))
        except (Exception, SystemExit) as error:  # somebody's code: whatever it is, say whose
            raise ValueError(f"{self._key}: {self.name} raised {type(error).__name__}: {error}") from error
        return rewards_of(answer, len(samples.responses), f"{self._key}: {self.name}")


def _function(key: str, source: str) -> Callable[..., Any]:
    module_name, _, name = source.rpartition(":")
    if not module_name:
        raise ValueError(f"{key}: expected MODULE:FUNCTION or FILE.py:FUNCTION, got {source!r}")
    try:
        module = _file_module(Path(module_name)) if module_name.endswith(".py") else _named_module(module_name)
    except (Exception, SystemExit) as error:  # somebody's code
        raise ValueError(f"{key}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{key}: expected a function {name} in {module_name}, got none")
    result: Callable[..., Any] = function
    return result


def _file_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _named_module(name: str) -> Any:
    here = os.getcwd()  # where a command is run is not on its path, unlike a script's folder
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(here)
