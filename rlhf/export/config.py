"""The config of `prudent export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ..job.config import JobConfig


class ExportConfig(JobConfig):
    """Which reward model to write, in what form, and where."""

    model: str = Field(description="Reward model, an ensemble or any one-head sequence classifier: folder or hub name.")
    to: Path = Field(description="New folder for the exported model.")
    as_: Literal["stock", "linear", "remote-code"] = Field(
        description="What the folder holds: a classifier with 2K labels and a client that finishes the reward, an "
        "ordinary one-label reward model, or the whole model with one file of code."
    )
    aggregation: str | None = Field(
        default=None,
        description="How K heads are combined into one reward, e.g. mean or lcb:1; null: the model's own.",
    )
    append_eos: bool | None = Field(
        default=None,
        description="Whether a classifier trained elsewhere read EOS after plain texts; null: yes for decoders.",
    )
    max_shard_size: str = Field(default="5GB", description="Largest file of weights, such as 500MB or 5GB.")

    @field_validator("max_shard_size")
    @classmethod
    def _a_size(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*[KMG]i?B", value):
            raise ValueError(f"expected a size such as 500MB or 5GB, got {value!r}")
        return value
