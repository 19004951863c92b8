"""HTTP/1.1 for clients of every kind: uvicorn alone waits for ever for the head of a connection's first request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """uvicorn's h11 protocol that closes a connection whose next request's head is not there within `head_timeout`."""

    head_timeout = 20.0  # seconds

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        self._head_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Read; wait on if this was only a part of a head."""
        super().data_received(data)
        if self._waits_for_head() and not self.transport.is_closing():
            self._wait_for_head()
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    def _waits_for_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_head(self) -> None:
        if self._head_timer is None:  # from the head's first byte: one byte a second does not prolong it
            self._head_timer = self.loop.call_later(self.head_timeout, self._late)

    def _late(self) -> None:
        self._head_timer = None
        if self._waits_for_head() and not self.transport.is_closing():
            self.transport.close()


def protocol(head_timeout: float) -> type[PatientProtocol]:
    """The protocol class with this timeout in seconds; uvicorn makes an instance a connection."""
    return type("Protocol", (PatientProtocol,), {"head_timeout": head_timeout})
