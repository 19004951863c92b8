"""Refuse models that need code of their own: never run Python files beside the weights, and never prompt the user."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig

# options that locate a model, and so apply to its configuration too
_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


@contextmanager
def refusing_own_code(name: object) -> Iterator[None]:
    """Turn transformers' refusal of a model with code of its own (auto_map) into one ValueError that says what to do.

    Inside the block, pass trust_remote_code=False to every loader: with None, transformers asks on standard output and
    reads the answer from standard input.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name}: needs code of its own (auto_map in its JSON files), which prudent does not run: use a version of "
            "the model whose code is in transformers, or load it in Python, where you can allow its code, and pass the "
            "instance to EnsembleRewardModel.from_sequence_classifier or from_trunk"
        ) from error


def without_own_code(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` for a from_pretrained, with trust_remote_code=False unless the caller set it."""
    return {"trust_remote_code": False, **kwargs}


def load_config(source: str | os.PathLike[str], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Load the configuration of a folder or hub name, without reading weights.

    `kwargs` are those of the model's from_pretrained; only the options that locate the model are used.

    Raises:
        ValueError, OSError: for a model with code of its own, or one that cannot be read.
    """
    options = {name: value for name, value in (kwargs or {}).items() if name in _HUB_OPTIONS}
    with refusing_own_code(source):
        return AutoConfig.from_pretrained(source, **without_own_code(options))
