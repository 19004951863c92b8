"""The config of `prudent serve`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from pydantic import Field, field_validator

from ...engine import Aggregation
from ..doors.wire import check_alone
from ..job.config import JobConfig


class ServeConfig(JobConfig):
    """Which models to serve, where, and within which limits."""

    model: tuple[str, ...] = Field(
        min_length=1, description="Reward model, folder or hub name, or NAME=FOLDER; the first is the default."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0: every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    token: str | None = Field(
        default=None,
        description="Bearer token that requests must carry; null: that of the environment's PRUDENT_TOKEN, else none.",
    )
    aggregation: str | None = Field(
        default=None,
        description="How K heads become one reward, unless a request says otherwise; null: the model's own.",
    )
    batch_tokens: int = Field(
        default=4096, ge=1, description="Tokens taken from the queue at a time; a CPU scores them in passes of 512."
    )
    wait_ms: float = Field(default=3.0, ge=0, description="Milliseconds that an item waits for others to join it.")
    max_length: int | None = Field(
        default=None, ge=1, description="Tokens kept, from the end, of a longer text; null: the model's limit."
    )
    append_eos: bool | None = Field(
        default=None,
        description="Whether a classifier trained elsewhere read EOS after plain texts; null: yes for decoders.",
    )
    timeout: float = Field(default=120.0, gt=0, description="Seconds until a request that is not scored gets a 504.")
    read_timeout: float = Field(
        default=20.0, gt=0, description="Seconds in which a client must send a request's head, and then its body."
    )
    max_queue: int = Field(default=4096, ge=1, description="Items waiting; a request that would add more gets a 429.")
    max_items: int = Field(default=1024, ge=1, description="Items in one request.")
    max_chars: int = Field(default=200_000, ge=1, description="Characters of one item.")
    max_body: int = Field(default=16_000_000, ge=1, description="Bytes of a request's body.")

    @field_validator("aggregation")
    @classmethod
    def _check_aggregation(cls, value: str | None) -> str | None:
        if value is not None:
            check_alone(Aggregation.parse(value))
        return value

    @field_validator("model")
    @classmethod
    def _check_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = Counter(name for name, _ in map(named, value))
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"expected models of different names, got {twice[0]!r} twice: write NAME=FOLDER")
        return value


def named(text: str) -> tuple[str, str]:
    """(name, folder or hub name) of "NAME=FOLDER" or "FOLDER", which is then named after its run folder."""
    name, equals, source = text.partition("=")
    if equals and source and re.fullmatch(r"[\w.-]+", name):
        return name, source
    parts = Path(text).parts
    names = [part for part in parts if part not in ("model", "/", ".", "..")] or list(parts)
    return names[-1] if names else text, text
