"""Rewards from a Python function: import it, match its arguments to prompts and responses, call it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..batch import Samples
from .answers import rewards_of
from .sources import Rewards, Texts

# ours and TRL's names for the two arguments, in the singular too
_MEANING = {
    **dict.fromkeys(("prompts", "prompt"), "prompts"),
    **dict.fromkeys(("responses", "response", "completions", "completion"), "responses"),
}
_TO_ANY_KEYWORD = ("prompts", "responses", "completions")  # given to **kwargs
# arguments of other trainers' reward functions that PPO lacks: never taken for prompts or responses
_OF_OTHER_TRAINERS = {
    "queries", "query", "label", "labels", "data_source", "solution_str", "ground_truth", "extra_info", "reference",
    "references", "target", "targets", "solution", "solutions", "gold",
}  # fmt: skip
# names that contradict the place of an argument: the first is the prompts, the second the responses
_NOT_FIRST = {
    "output",
    "outputs",
    "answer",
    "answers",
    "generation",
    "generations",
    "reply",
    "replies",
    "text",
    "texts",
}
_NOT_SECOND = {"input", "inputs", "question", "questions", "instruction", "instructions"}


class CallableReward:
    """MODULE:FUNCTION or FILE.py:FUNCTION, called once per step with lists of prompts and responses.

    Arguments named prompts, or responses or completions (or one of these in the singular), get those lists whatever
    their order; two arguments with other names get prompts, then responses. A prompt is a text, or a list of messages
    if the run's prompts are; a response is a text. The answer is a list, array or tensor of N numbers (True counts as
    1), None or NaN for a missing one; or a mapping with `rewards` and, optionally, `nominal`, `worst`, `distance` (N
    numbers each), `mean` and `std` (N lists of K).

    Args:
        key: the config key that errors name.
        source: the function.
        texts: prompts and the policy's tokeniser.

    Raises:
        ValueError: for a missing function, or one that needs an argument that PPO does not have; from a call, if the
            function raises an error or returns something else.
    """

    num_heads: int | None = None

    def __init__(self, key: str, source: str, texts: Texts) -> None:
        self.name, self._key, self._texts = source, key, texts
        self._function = _function(key, source)
        self._arguments = _arguments(self._function, f"{key}: {source}")

    def __call__(self, samples: Samples, seed: int | None = None) -> Rewards:
        """The rewards of all samples, in their order."""
        values = {"prompts": self._texts.prompts_of(samples), "responses": self._texts.responses_of(samples)}
        args = [values[meaning] for meaning in self._arguments.by_position]
        kwargs = {name: values[meaning] for name, meaning in self._arguments.by_name.items()}
        try:
            answer = self._function(*args, **kwargs)
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            raise ValueError(f"{self._key}: {self.name} raised {type(error).__name__}: {error}") from error
        return rewards_of(answer, len(samples.responses), f"{self._key}: {self.name}")


class _Arguments(NamedTuple):
    """The arguments of a call: "prompts" or "responses" for each."""

    by_position: tuple[str, ...]
    by_name: dict[str, str]


def _arguments(function: Callable[..., Any], where: str) -> _Arguments:
    """Match the function's arguments; ValueError if a required one is neither prompts nor responses."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled code may have no signature
        return _Arguments(("prompts", "responses"), {})
    parameters = list(signature.parameters.values())
    kinds = {p.kind for p in parameters}
    single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    known = [p for p in single if p.name in _MEANING]
    unknown = [p.name for p in single if p.name not in _MEANING and p.default is p.empty]
    expected = f"{where}: expected a function of prompts and responses (or completions), got {signature}"
    if not known and _takes_two(parameters):
        return _Arguments(("prompts", "responses"), {})
    if unknown:
        raise ValueError(f"{expected}: PPO has no value for {unknown[0]}")
    by_position = tuple(_MEANING[p.name] for p in known if p.kind is p.POSITIONAL_ONLY)
    by_name = {p.name: _MEANING[p.name] for p in known if p.kind is not p.POSITIONAL_ONLY}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        by_name |= {name: _MEANING[name] for name in _TO_ANY_KEYWORD if name not in signature.parameters}
    if "responses" not in (*by_position, *by_name.values()):
        raise ValueError(f"{expected}: it takes no responses")
    return _Arguments(by_position, by_name)


def _takes_two(parameters: list[inspect.Parameter]) -> bool:
    """Whether a call with two unnamed arguments fits, and their names do not say that they are something else."""
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    fits = set(needed) <= set(positional[:2]) and (len(positional) >= 2 or any_number)
    names = [p.name for p in positional[:2]]
    return fits and not any(
        name in _OF_OTHER_TRAINERS | otherwise
        for name, otherwise in zip(names, (_NOT_FIRST, _NOT_SECOND), strict=False)
    )


def _function(key: str, source: str) -> Callable[..., Any]:
    module_name, _, name = source.rpartition(":")
    if not module_name:
        raise ValueError(f"{key}: expected MODULE:FUNCTION or FILE.py:FUNCTION, got {source!r}")
    try:
        module = _file_module(Path(module_name)) if module_name.endswith(".py") else _named_module(module_name)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
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
    here = os.getcwd()  # a command's working folder is not on sys.path, unlike a script's own
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(here)
