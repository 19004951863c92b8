"""How a study writes its command and its numbers, and by which rule an interval becomes a word."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import reduce

from ..config import JobConfig, config_keys

_FLAGS = ("model", "seeds")  # told always


def command(study: str, config: JobConfig) -> str:
    """What to type for the numbers of `config`: every key that is not its default; where they go is left open."""
    kind = type(config)
    needed = {name: getattr(config, name) for name, field in kind.model_fields.items() if field.is_required()}
    plain, words = kind.model_validate(needed), ["prudent", "study", study]
    for key in config_keys(kind):
        default, value = (reduce(getattr, key.split("."), c) for c in (plain, config))
        if key in _FLAGS:
            words += [f"--{key}", str(value)]
        elif value != default and key != "output":
            words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"]
    return shlex.join(words)


def count(number: int, what: str) -> str:
    """The number of things: "1 sample", "2 samples"."""
    return f"{number} {what}{'s' * (number != 1)}"


def interval(values: Sequence[float | None], digits: int = 2) -> str:
    """(value, low, high) -> "[low, high]"; "" where the data gave none."""
    _, low, high = values
    return "" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def signed(values: Sequence[float | None], digits: int = 2) -> str:
    """(value, low, high) of a difference -> "+value [+low, +high]"."""
    value, low, high = values
    if value is None:
        return ""
    if low is None or high is None:
        return f"{value:+.{digits}f}"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def verdict(values: Sequence[float | None]) -> str:
    """`higher` or `lower` where the interval (value, low, high) leaves 0 out, else `no difference shown`."""
    _, low, high = values
    if low is not None and low > 0:
        return "higher"
    if high is not None and high < 0:
        return "lower"
    return "no difference shown"
