"""Rewards from a server, over HTTP."""

from __future__ import annotations

import json
import logging
import time
import urllib.parse
from typing import Any
from urllib.request import getproxies, proxy_bypass

from tqdm.contrib.logging import logging_redirect_tqdm
from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, TimeoutError
from urllib3.util import Retry, make_headers, parse_url

from ...job.log import muted
from ..batch import Samples
from .answers import rewards_of
from .sources import Rewards, Texts

logger = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 16.0)  # seconds before each further try: enough for a server to restart
_BUSY = {429, *range(500, 600)}  # statuses that justify another try
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}


class HTTPReward:
    """A server that answers one POST per step: JSON in, JSON out.

    It gets `prompts`, `responses`, and `query`: prompt and response in the policy's template, special tokens included,
    which OpenRLHF's reward servers read. It answers {"rewards": [N numbers, null for a missing one]}, optionally with
    `nominal`, `worst`, `mean` and `std`, or the bare list.

    A request without an answer is sent again a few times, each time with a warning in the log.

    Args:
        key: the config key that errors name.
        url: of the server.
        texts: prompts and the policy's tokeniser.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: for a wrong URL; from a call, if the request is refused (4xx), if no answer comes in time after a
            few tries, or for an answer of another form.
    """

    num_heads: int | None = None

    def __init__(self, key: str, url: str, texts: Texts, *, timeout: float = 60.0) -> None:
        _check_url(key, url)
        self.name, self._where, self._texts, self._timeout = url, f"{key}: {url}", texts, timeout
        self._connections = _connections(url)

    def __call__(self, samples: Samples, seed: int | None = None) -> Rewards:
        """The rewards of all samples, in their order."""
        texts = self._texts
        body = {
            "prompts": texts.prompts_of(samples),
            "responses": texts.responses_of(samples),
            "query": texts.whole_of(samples),
        }
        raw = self._post(json.dumps(body).encode())
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f"{self._where}: expected JSON, got {raw[:200]!r}") from None
        return rewards_of(answer, len(samples.responses), self._where)

    def _post(self, body: bytes) -> bytes:
        retries = _Retries(where=self._where, timeout=self._timeout)
        try:
            # urllib3 warns of each retry too, without the reward's name
            with logging_redirect_tqdm(), muted("urllib3.connectionpool"):
                response = self._connections.request(
                    "POST", self.name, body=body, headers=_HEADERS, timeout=self._timeout, retries=retries
                )
        except HTTPError as error:
            cause = error.reason if isinstance(error, MaxRetryError) else error
            reason = _reason(cause, self._timeout)
        else:
            if 200 <= response.status < 300:
                return response.data
            reason = _status(response)
            if response.status not in _BUSY:
                raise ValueError(f"{self._where} refused the request: {reason}")
        tries = len(WAITS) + 1
        raise ValueError(f"{self._where}: expected rewards, got none in {tries} tries, last {reason}")


class _Retries(Retry):
    """Send a request again after `WAITS`; each failed try is a warning in the log."""

    def __init__(self, *, where: str, timeout: float, **options: Any) -> None:
        ours: dict[str, Any] = {"total": len(WAITS), "allowed_methods": None, "status_forcelist": _BUSY}
        ours |= {"raise_on_status": False, "respect_retry_after_header": False}
        super().__init__(**{**ours, **options})
        self.where, self.timeout = where, timeout

    def new(self, **changed: Any) -> _Retries:
        """A copy with some options changed."""
        return super().new(where=self.where, timeout=self.timeout, **changed)

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        """Log what went wrong, and wait."""
        tried, error = len(self.history), self.history[-1].error
        reason = _reason(error, self.timeout) if response is None else _status(response)
        wait = WAITS[tried - 1]
        logger.warning("%s: try %d of %d: %s; again in %g s", self.where, tried, len(WAITS) + 1, reason, wait)
        time.sleep(wait)


def _reason(error: Exception | None, timeout: float) -> str:
    # urllib3 2 counts a refused connection as a timeout
    if isinstance(error, TimeoutError) and not isinstance(error, NewConnectionError):
        return f"no answer within {timeout:g} s"
    cause = getattr(error, "__cause__", None)
    return str(cause or error)


def _status(response: BaseHTTPResponse) -> str:
    """The status and the beginning of a refusal."""
    return f"{response.status} {response.reason}: {response.data[:200].decode(errors='replace')!r}"


def _connections(url: str) -> PoolManager:
    """A pool of connections, through the proxy that the environment names for `url`, if any."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    if not proxy:
        return PoolManager()
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    return ProxyManager(proxy, proxy_headers=make_headers(proxy_basic_auth=parse_url(proxy).auth))


def _check_url(key: str, url: str) -> None:
    """Refuse a wrong URL before the first step; urllib3 would do so during a step, or look up an empty host name."""
    reason = None
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            reason = f"its scheme is {parts.scheme or 'missing'}"
        elif not url.isascii() or not url.isprintable() or " " in url:
            reason = "blanks and non-ASCII characters must be written as %XX"
        elif not parts.hostname or parts.port == 0:
            reason = "it has no host" if not parts.hostname else "its port is 0"
    except ValueError as error:  # a port that is not a number, half an IPv6 address
        reason = str(error)
    if reason is not None:
        raise ValueError(f"{key}: expected a URL as http://host:8000/path, got {url!r} ({reason})")
