"""Write a config as the command that makes it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import reduce
from typing import Any

from .config import JobConfig, config_field, config_keys, flag_name, read_value


def command_of(name: str, config: JobConfig, flags: Sequence[str]) -> str:
    """`prudent NAME` with `flags` as flags and every other key that differs from its default as --set, a line each.

    It makes an equal config, whether that came from a file, from flags or from Python.
    """
    values, given, sets = config.model_dump(mode="json"), [], []
    for key in config_keys(type(config)):
        field = config_field(type(config), key)
        value = _at(values, key)
        if not field.is_required() and reduce(getattr, key.split("."), config) == field.default:
            continue
        if key in flags:
            given.append(f"--{flag_name(key)} {shlex.quote(str(value))}")
        else:
            sets.append(f"--set {shlex.quote(f'{key}={_as_yaml(value)}')}")
    return " \\\n    ".join([f"prudent {name}", *given, *sets])


def _at(values: Any, key: str) -> Any:
    return reduce(lambda inner, part: inner[part], key.split("."), values)


def _as_yaml(value: Any) -> str:
    """A plain word as it is; anything else as JSON, which YAML reads too."""
    return value if isinstance(value, str) and read_value(value) == value else json.dumps(value, ensure_ascii=False)
