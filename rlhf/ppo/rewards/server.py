"""Rewards of a server, over HTTP."""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request

from tqdm.contrib.logging import logging_redirect_tqdm

from ..batch import Samples
from .answers import rewards_of
from .sources import Rewards, Texts

logger = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 16.0)  # seconds before a request is sent again: a server restarts in such a time, or not at all


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

    def __init__(self, key: str, url: str, texts: Texts, *, timeout: float = 60.0) -> None:
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
        return rewards_of(answer, len(samples.responses), where)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.name, body, headers)
        tries, reason = len(WAITS) + 1, ""
        for number, wait in enumerate((*WAITS, None), 1):
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
