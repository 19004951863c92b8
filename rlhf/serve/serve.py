"""Run `prudent serve`."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from .config import ServeConfig

logger = logging.getLogger(__name__)
_BACKLOG = 2048  # connections that wait to be accepted
_MISSING = "serve: expected {}, which is not installed: pip install 'prudent[serve]'"


@dataclass
class ServeResult:
    """What a server has done: `requests` answered, on `address`."""

    address: str
    requests: int

    def __str__(self) -> str:
        return f"{self.address}: {self.requests} requests answered; all of the queue is done"


def run_serve(config: ServeConfig, *, progress: bool = True) -> ServeResult:
    """Serve rewards until SIGTERM or an interrupt; requests under way are answered first.

    Args:
        config: see `ServeConfig`.
        progress: say on stderr what is served, and where.

    Raises:
        ImportError: without the packages of the extra `serve`.
        ValueError: for a model that cannot be loaded, or a port that cannot be listened on.
    """
    try:
        import uvicorn

        from .app import Server, make_app
        from .protocol import protocol
    except ImportError as error:
        raise ImportError(_MISSING.format(error.name)) from error
    from .models import load_models

    listening = _bind(config.host, config.port)
    with listening:
        token = config.token or os.environ.get("PRUDENT_TOKEN") or None
        server = Server(config, load_models(config), token)
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if token is None and not _is_loopback(host):
            logger.warning("serve: %s can be reached by others and has no token: set PRUDENT_TOKEN", address)
        listening.listen(_BACKLOG)  # only now: a client must not wait for the models to load
        if progress:
            _announce(server, address)
        running = uvicorn.Server(
            uvicorn.Config(
                make_app(server),
                http=protocol(config.read_timeout),
                ws="none",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=int(config.timeout) + 1,
                backlog=_BACKLOG,
            )
        )
        if hasattr(signal, "SIGTERM"):
            # uvicorn raises the signal again once it has drained: that must not end the process as a kill does
            before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            running.run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)
    return ServeResult(address, running.server_state.total_requests)


def _announce(server: Any, address: str) -> None:
    for name, model in server.models.by_name.items():
        line = f"serving {name} ({model.source}): {model.num_heads} heads, {model.aggregation}"
        print(line, file=sys.stderr)
    print(f"on {address}: the page is /, the paths are in /openapi.json", file=sys.stderr, flush=True)


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. A port that is taken is found before the models are loaded."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise ValueError(f"port: expected one that is free on {host}, got {port} ({error.strerror})") from None
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
