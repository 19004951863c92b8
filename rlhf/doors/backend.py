"""Score a trainer's responses with a model in this process or on a server: one interface for both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any, Protocol, TypeAlias

import torch

from ...engine import Aggregation, EnsembleRewardConfig, Scorer
from ...engine.errors import ItemError
from ...engine.text import Encoded
from ..evaluation.by_item import by_item
from ..job.log import muted, say_once
from ..models.loading import load_reward, load_reward_config, model_folder
from .client import RewardClient

Scored: TypeAlias = dict[str, Any]
"""An item's numbers: reward, mean, std (K each) and, if the model or the server says them, nominal, worst, distance;
None for a number that is not finite. truncated: whether it lost its beginning."""

Source: TypeAlias = "str | PathLike[str] | Scorer"


class Backend(Protocol):
    """Scores items in `Scorer`'s forms; one dict an item, in their order."""

    def score(self, items: Sequence[Any]) -> list[Scored]: ...

    async def score_async(self, items: Sequence[Any]) -> list[Scored]: ...


class LocalBackend:
    """A reward model in this process; from a folder or hub name, its weights are read when it first scores.

    It may be called from several threads, one of which scores at a time. Autocast is off while it scores, and weights
    are read whole under DeepSpeed's ZeRO-3, so that the rewards are those of `Scorer`. Pickled, it is the name of the
    folder, and a child process reads the weights again.

    An item that cannot be read (a response that the chat template refuses, say) gets None instead of numbers, with a
    warning once a reason; if no item can be read, the first one's ValueError is raised.
    """

    def __init__(self, source: Source, aggregation: Aggregation | None, *, batch_tokens: int = 4096) -> None:
        self.aggregation, self.batch_tokens = aggregation, batch_tokens
        self._scorer: Scorer | None = None
        self._lock = threading.Lock()
        if isinstance(source, Scorer):
            self.folder, self._scorer = None, source
            self._check(source.model.config)
        else:
            self.folder = model_folder(str(source))
            self._check(load_reward_config("model", self.folder))

    def _check(self, config: Any) -> None:
        """Refuse an aggregation that the model cannot have, before any weight is read."""
        if self.aggregation is not None:
            self.aggregation.check_heads(config.num_heads if isinstance(config, EnsembleRewardConfig) else 1)
            if self.aggregation.trust is not None and getattr(config, "trust_directions", None) is None:
                raise ValueError(
                    f"aggregation: expected a model with a trust region for {str(self.aggregation)!r}, got one "
                    "without: fit one with `prudent calibrate --model DIR --data FILE`"
                )

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is None:
            raise TypeError(
                "model_or_url: expected a folder, a hub name or a URL, to be pickled, got a Scorer in memory"
            )
        return {**self.__dict__, "_scorer": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": threading.Lock()}

    @property
    def scorer(self) -> Scorer:
        """The scorer; from a folder, loaded at the first use."""
        if self._scorer is None:
            with _whole_weights():
                self._scorer = load_reward("model", str(self.folder)).scorer(self.batch_tokens)
        return self._scorer

    def score(self, items: Sequence[Any]) -> list[Scored]:
        """Score all items, in micro-batches of `batch_tokens` tokens."""
        with self._lock:
            scorer = self.scorer
            read = _read(scorer, items)
            device = scorer.model.get_input_embeddings().weight.device.type
            # what it would warn of is among the results
            with torch.autocast(device, enabled=False), muted(Scorer.__module__):
                good = [item for item in read if not isinstance(item, ItemError)]
                scores = scorer.score(good, aggregation=self.aggregation)
        found = iter([{**row, "truncated": item.truncated} for row, item in zip(by_item(scores), good, strict=True)])
        names = ["reward", "nominal", "worst", *([] if scores.distance is None else ["distance"])]
        k = scores.mean.shape[1]
        missing = {**dict.fromkeys(names), "mean": [None] * k, "std": [None] * k, "truncated": False}
        return [{**missing} if isinstance(item, ItemError) else next(found) for item in read]

    async def score_async(self, items: Sequence[Any]) -> list[Scored]:
        """`score` in a thread."""
        return await asyncio.to_thread(self.score, items)


def open_backend(
    source: Source,
    aggregation: str | Aggregation | None = None,
    trust: float | None = None,
    *,
    batch_tokens: int = 4096,
    timeout: float = 60.0,
) -> LocalBackend | RewardClient:
    """The backend of a URL (http:// or https://), a folder, a hub name or a `Scorer`.

    Raises ValueError for an aggregation that cannot be used, a folder without a reward model, or a wrong URL.
    """
    spec = None if aggregation is None else Aggregation.parse(aggregation)
    remote = is_url(source)
    if trust is not None:
        if spec is None and remote:
            raise ValueError("aggregation: expected one beside trust, because the server's own is not known here")
        spec = replace(spec or _own(source), trust=trust)
    if spec is not None and spec.centre != "none":
        raise ValueError(f"aggregation: expected centre=none, because the trainer centres rewards, got {str(spec)!r}")
    if remote:
        return RewardClient(
            str(source), aggregation=None if spec is None else str(spec), timeout=timeout, name="model_or_url"
        )
    if spec is None:
        spec = _own(source).with_centre("none")
    return LocalBackend(source, spec, batch_tokens=batch_tokens)


def is_url(source: object) -> bool:
    """Whether it names a server."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _own(source: Source) -> Aggregation:
    """The aggregation that a model comes with."""
    if isinstance(source, Scorer):
        aggregation: Aggregation = source.model.score.aggregation
        return aggregation
    config = load_reward_config("model", model_folder(str(source)))
    return Aggregation.parse(config.aggregation if isinstance(config, EnsembleRewardConfig) else "mean")


def _read(scorer: Scorer, items: Sequence[Any]) -> list[Encoded | ItemError]:
    try:
        return list(scorer.read_all(items))
    except ItemError:
        pass
    read: list[Encoded | ItemError] = []
    for place, item in enumerate(items):
        try:
            read.append(scorer.read(item, f"item {place}"))
        except ItemError as error:
            read.append(error)
    errors = [error for error in read if isinstance(error, ItemError)]
    if len(errors) == len(items):
        raise errors[0]
    for reason in dict.fromkeys(error.reason for error in errors):
        say_once(f"prudent: a response without a reward, because it cannot be read: {reason}")
    return read


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Read weights whole where DeepSpeed's ZeRO-3 trains: transformers would give each rank a part of them.

    A reward model in parts needs the same number of forward passes on every rank, which scoring by a budget of tokens
    does not give.
    """
    from transformers.integrations import deepspeed

    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known
