"""Rewards from outside the policy: another model, a function, a server, a lexicon."""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import json
import logging
import math
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from ....engine import Aggregation
from ...data.gold import VaderGold
from ...data.rows import Text
from ...models.loading import load_scorer
from ...sampling.prompts import Prompt
from ...sampling.turn import response_text
from ..batch import Samples

logger = logging.getLogger(__name__)

_BATCH_TOKENS = 8192  # of a reward model, padding included
_WAITS = (1.0, 4.0, 16.0)  # seconds before a request is sent again: a server restarts in such a time, or not at all


class Rewards(NamedTuple):
    """N samples scored; fp32 on the CPU.

    reward          [N], NaN where scoring failed
    nominal, worst  [N] of K > 1 heads, else None
    mean, std       [N, K], None where the source has no heads
    """

    reward: Tensor
    nominal: Tensor | None = None
    worst: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None


class RewardSource(Protocol):
    """Scores samples. name: for logs; num_heads: K, None where there are no heads."""

    name: str
    num_heads: int | None

    def __call__(self, samples: Samples) -> Rewards:
        """The rewards of all samples, in their order."""
        ...


class Texts:
    """What was asked and said, for whoever does not read the policy's tokens."""

    def __init__(self, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts

    def asked(self, samples: Samples) -> list[Text]:
        """The prompts as they were given: texts or messages."""
        return [self.prompts[index].item for index in samples.prompt_index]

    def said(self, samples: Samples) -> list[str]:
        """The responses without stop token and other special tokens."""
        rows = zip(samples.prompts, samples.responses, samples.stopped, strict=True)
        return [response_text(self.tokenizer, p, r[:-1] if stopped else r) for p, r, stopped in rows]

    def whole(self, samples: Samples) -> list[str]:
        """Prompt and response in the policy's own template, special tokens included."""
        rows = zip(samples.prompts, samples.responses, strict=True)
        return [str(self.tokenizer.decode(p + r, skip_special_tokens=False)) for p, r in rows]


class ModelReward:
    """An EnsembleRewardModel or one-head sequence classifier, with its own tokeniser and template.

    Args:
        source: folder or hub name.
        texts: prompts and the policy's tokeniser.
        device: where the model goes.
        aggregation: "" the model's own; of one head always mean.

    Raises:
        ValueError: for a model that cannot be loaded, an aggregation that names a head it has not, or a prompt that
            its tokeniser cannot read.
    """

    def __init__(self, source: str, texts: Texts, device: torch.device | str, aggregation: str) -> None:
        self._scorer = load_scorer(source, _BATCH_TOKENS, None, progress=False, key="reward.source")
        self._scorer.model.to(device).requires_grad_(False)
        head = self._scorer.model.score
        self.name, self.num_heads, self._texts = source, head.num_heads, texts
        own = head.aggregation if not aggregation else Aggregation.parse(aggregation)
        try:
            own.check_heads(head.num_heads)
        except ValueError as error:
            raise ValueError(f"reward.{error}") from None
        self._aggregation = (Aggregation.parse("mean") if head.num_heads == 1 else own).with_centre("none")
        for prompt in texts.prompts[:1]:
            try:
                self._scorer.encode({"prompt": prompt.item, "response": "a"})
            except ValueError as error:
                raise ValueError(f"reward.source: {source} cannot read the prompts: {error}") from error

    def __call__(self, samples: Samples) -> Rewards:
        """See `RewardSource`.

        An answer that was cut off is read as an ended one, as heads on the trunk read it: another last token would be
        another reward. What being cut off costs is `reward.missing_eos_penalty`.
        """
        rows = zip(self._texts.asked(samples), self._texts.said(samples), strict=True)
        items = [{"prompt": p, "response": r} for p, r in rows]
        scores = self._scorer.score(items, aggregation=self._aggregation)
        several = self.num_heads > 1
        return Rewards(
            _column(scores.reward),
            _column(scores.nominal) if several else None,
            _column(scores.worst) if several else None,
            scores.mean,
            scores.std,
        )


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
        return _rewards(answer, len(samples.responses), f"{self._key}: {self.name}")


class HTTPReward:
    """A server that answers one POST a step: JSON in, JSON out.

    It gets `prompts`, `responses`, and `query`: prompt and response in the policy's template, special tokens included,
    which is what OpenRLHF's reward servers read. It answers {"rewards": [N numbers, null where there is none]}, with
    `nominal`, `worst`, `mean` and `std` beside it where it has them, or the bare list.

    Args:
        url: where.
        texts: prompts and the policy's tokeniser.
        timeout: seconds for an answer.
        key: of the config, for errors.

    A request without an answer is sent again a few times, each with a warning in the log.

    Raises:
        ValueError: for what is no URL; from a call, when the request is refused (4xx), when no answer came in time
            after a few tries, or for an answer of another form.
    """

    num_heads: int | None = None

    def __init__(self, url: str, texts: Texts, *, timeout: float = 60.0, key: str = "reward.source") -> None:
        _check_url(key, url)
        self.name, self._texts, self._timeout, self._key = url, texts, timeout, key

    def __call__(self, samples: Samples) -> Rewards:
        """See `RewardSource`."""
        texts = self._texts
        body = {"prompts": texts.asked(samples), "responses": texts.said(samples), "query": texts.whole(samples)}
        raw = self._post(json.dumps(body).encode())
        where = f"{self._key}: {self.name}"
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: expected JSON, got {raw[:200]!r}") from None
        return _rewards(answer, len(samples.responses), where)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.name, body, headers)
        tries, reason = len(_WAITS) + 1, ""
        for number, wait in enumerate((*_WAITS, None), 1):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {_begin(error)!r}"
                if error.code < 500 and error.code != 429:
                    raise ValueError(f"{self._key}: {self.name} refused the request: {reason}") from None
            except TimeoutError:
                reason = f"no answer within {self._timeout:g} s"
            except http.client.HTTPException as error:  # an answer that ends in the middle, or is no HTTP
                reason = repr(error)
            except OSError as error:
                reason = str(getattr(error, "reason", error))
            if wait is not None:
                with logging_redirect_tqdm():
                    logger.warning(
                        "%s: %s: try %d of %d: %s; again in %g s", self._key, self.name, number, tries, reason, wait
                    )
                time.sleep(wait)
        raise ValueError(f"{self._key}: {self.name}: expected rewards, got none in {tries} tries, last {reason}")


class VaderReward:
    """The compound sentiment of the response alone; see `gold.VaderGold`."""

    name = "vader"
    num_heads: int | None = None

    def __init__(self, texts: Texts) -> None:
        self._texts, self._gold = texts, VaderGold()

    def __call__(self, samples: Samples) -> Rewards:
        """See `RewardSource`."""
        return Rewards(torch.tensor(self._gold(self._texts.said(samples)), dtype=torch.float32))


def _check_url(key: str, url: str) -> None:
    """Before the first step: urllib would say so in the middle of it, or wait for a host without a name."""
    reason = None
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            reason = f"its scheme is {parts.scheme or 'missing'}"
        elif not url.isascii() or not url.isprintable() or " " in url:
            reason = "blanks and what is not ASCII are written %XX"
        elif not parts.hostname or parts.port == 0:
            reason = "no host is given" if not parts.hostname else "there is no port 0"
    except ValueError as error:  # a port that is no number, half an IPv6 address
        reason = str(error)
    if reason is not None:
        raise ValueError(f"{key}: expected a URL as http://host:8000/path, got {url!r} ({reason})")


def _begin(error: urllib.error.HTTPError) -> str:
    """The first words of a refusal, if they can be read."""
    try:
        return error.read(200).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


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


def _rewards(answer: Any, count: int, where: str) -> Rewards:
    """Somebody's answer, checked."""
    parts = dict(answer) if isinstance(answer, Mapping) else {"rewards": answer}
    if "rewards" not in parts:
        raise ValueError(f"{where}: expected rewards in the answer, got {', '.join(map(str, parts)) or 'an empty one'}")
    if parts["rewards"] is None:
        raise ValueError(f"{where}: expected rewards, got None")
    given = {
        name: _numbers(parts[name], count, f"{where}: {name}", matrix=name in ("mean", "std"))
        for name in ("rewards", "nominal", "worst", "mean", "std")
        if parts.get(name) is not None
    }
    mean, std = given.get("mean"), given.get("std")
    if mean is not None and std is not None and mean.shape != std.shape:
        raise ValueError(
            f"{where}: expected mean and std of the same heads, got {mean.shape[1]} and {std.shape[1]} a response"
        )
    reward = given.pop("rewards")
    return Rewards(torch.where(reward.isfinite(), reward, float("nan")), **given)


def _numbers(values: Any, count: int, where: str, matrix: bool) -> Tensor:
    """[N] or [N, K] fp32; None becomes NaN."""
    rows = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows) != count:
        got = f"{len(rows)}" if isinstance(rows, Sequence) and not isinstance(rows, str) else type(rows).__name__
        raise ValueError(f"{where}: expected a list of {count}, one a response, got {got}")
    if not matrix:
        return torch.tensor([_number(value, where) for value in rows], dtype=torch.float32)
    if not all(isinstance(row, Sequence) and len(row) == len(rows[0]) > 0 for row in rows):
        raise ValueError(f"{where}: expected one list a response, all of one length and none empty")
    return torch.tensor([[_number(value, where) for value in row] for row in rows], dtype=torch.float32)


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "tolist"):  # a tensor or array of one element in a list
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: expected numbers, None or NaN, got {value!r:.80}")
    try:
        return float(value)
    except OverflowError:  # an integer that is more than any float: as good as infinite
        return math.nan


def _column(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)
