"""POST JSON to a server, again while it is busy or away; errors are raised."""

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

from ..job.log import muted

logger = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 16.0)  # seconds before each further try: enough for a server to restart
LONGEST_WAIT = 60.0  # seconds; a Retry-After that asks for more gets this
_BUSY = {429, *range(500, 600)}  # statuses that justify another try
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}


class Endpoint:
    """One URL that answers JSON with JSON. It may be called from several threads, and pickled.

    A request without an answer, or with 429 or 5xx, is sent again after `WAITS`, or after the server's Retry-After if
    that is longer; each failed try is a warning in the log.

    Args:
        url: of the server.
        where: what errors and warnings begin with.
        timeout: seconds to wait for an answer.
        token: sent as a bearer token; None: none.
        connections: open connections that are kept for the next request.

    Raises:
        ValueError: from `post`, if the request is refused (other 4xx), if no answer comes in time after a few tries, or
            for an answer that is not JSON.
    """

    def __init__(
        self, url: str, where: str, *, timeout: float = 60.0, token: str | None = None, connections: int = 1
    ) -> None:
        self.url, self.where, self.timeout, self.connections = url, where, timeout, connections
        self._headers = _HEADERS if token is None else {**_HEADERS, "Authorization": f"Bearer {token}"}
        self._pool: PoolManager | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # connections belong to a process

    def post(self, body: Any) -> Any:
        """Send `body` as JSON and return the parsed answer."""
        raw = self._send(json.dumps(body).encode())
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f"{self.where}: expected JSON, got {raw[:200]!r}") from None

    def _send(self, body: bytes) -> bytes:
        if self._pool is None:
            self._pool = _connections(self.url, self.connections)
        retries = _Retries(where=self.where, timeout=self.timeout)
        try:
            # urllib3 warns of each retry too, without the server's name
            with logging_redirect_tqdm(), muted("urllib3.connectionpool"):
                response = self._pool.request(
                    "POST", self.url, body=body, headers=self._headers, timeout=self.timeout, retries=retries
                )
        except HTTPError as error:
            cause = error.reason if isinstance(error, MaxRetryError) else error
            reason = _reason(cause, self.timeout)
        else:
            if 200 <= response.status < 300:
                return response.data
            reason = _status(response)
            if response.status not in _BUSY:
                raise ValueError(f"{self.where} refused the request: {reason}")
        tries = len(WAITS) + 1
        raise ValueError(f"{self.where}: expected rewards, got none in {tries} tries, last {reason}")


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
        wait = max(WAITS[tried - 1], _retry_after(response))
        logger.warning("%s: try %d of %d: %s; again in %g s", self.where, tried, len(WAITS) + 1, reason, wait)
        time.sleep(wait)


def _retry_after(response: BaseHTTPResponse | None) -> float:
    """The seconds that a busy server asks to wait; 0 if it does not, or names a date."""
    text = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT) if text.isascii() and text.isdecimal() else 0.0


def _reason(error: Exception | None, timeout: float) -> str:
    # urllib3 2 counts a refused connection as a timeout
    if isinstance(error, TimeoutError) and not isinstance(error, NewConnectionError):
        return f"no answer within {timeout:g} s"
    cause = getattr(error, "__cause__", None)
    return str(cause or error)


def _status(response: BaseHTTPResponse) -> str:
    """The status and the beginning of a refusal."""
    return f"{response.status} {response.reason}: {response.data[:200].decode(errors='replace')!r}"


def _connections(url: str, count: int) -> PoolManager:
    """A pool of connections, through the proxy that the environment names for `url`, if any."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    if not proxy:
        return PoolManager(maxsize=count)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    return ProxyManager(proxy, maxsize=count, proxy_headers=make_headers(proxy_basic_auth=parse_url(proxy).auth))


def check_url(key: str, url: str) -> None:
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
    if "@" in parts.netloc:
        raise ValueError(
            f"{key}: expected a URL without user and password, which run folders and reports would show; a bearer "
            "token comes from PRUDENT_TOKEN"
        )
