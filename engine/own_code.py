"""Refuse models that need code of their own: Python files beside the weights are never run, and nothing is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig

# what says where a model is found, and so concerns its configuration too
_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


@contextmanager
def refusing_own_code(name: object) -> Iterator[None]:
    """Turn transformers' refusal of a folder whose auto_map names its own code into one ValueError with a way out.

    Inside, pass trust_remote_code=False to every loader: with None, transformers asks on standard output and reads the
    answer from standard input.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name}: needs code of its own (auto_map in its JSON files), which prudent does not run: use a version of "
            "the model that transformers itself has the code of, or load it in Python, where you can allow its code, "
            "and give the instance to EnsembleRewardModel.from_sequence_classifier or from_trunk"
        ) from error


def without_own_code(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` of a from_pretrained with trust_remote_code=False, unless the caller says otherwise."""
    return {"trust_remote_code": False, **kwargs}


def load_config(source: str | os.PathLike[str], kwargs: Mapping[str, Any] | None = None) -> Any:
    """The configuration in a folder or on a hub, before its weights are read.

    kwargs: of the model's from_pretrained; what says where the model is found is used.

    Raises:
        ValueError, OSError: for a folder with code of its own, or one that cannot be read.
    """
    options = {name: value for name, value in (kwargs or {}).items() if name in _HUB_OPTIONS}
    with refusing_own_code(source):
        return AutoConfig.from_pretrained(source, **without_own_code(options))
