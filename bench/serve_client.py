"""Many HTTP clients in one process: one connection each, one request at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Reply(NamedTuple):
    """status 0: the connection broke. seconds: from the first byte sent to the last one read."""

    status: int
    body: bytes
    seconds: float
    headers: dict[str, str]


async def load(
    port: int, body: Callable[[int], bytes], clients: int, requests: int, path: str = "/score"
) -> list[Reply]:
    """Replies to the bodies 0 .. requests - 1, in their order, asked for by `clients` connections at once."""
    replies: list[Reply | None] = [None] * requests
    left = iter(range(requests))
    await asyncio.gather(*(_client(port, path, body, left, replies) for _ in range(min(clients, requests))))
    return [reply for reply in replies if reply is not None]


async def _client(
    port: int, path: str, body: Callable[[int], bytes], left: Iterator[int], replies: list[Reply | None]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for index in left:
        if writer.is_closing():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.perf_counter()
        try:
            writer.write(request(path, body(index)))
            status, headers, content = await _read(reader)
        except (OSError, asyncio.IncompleteReadError):
            status, headers, content = 0, {}, b""
            writer.close()
        replies[index] = Reply(status, content, time.perf_counter() - began, headers)
    writer.close()


def request(path: str, body: bytes) -> bytes:
    """The bytes of a POST."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
