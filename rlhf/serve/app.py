"""The web application of `prudent serve`: it reads requests within limits, and answers in the dialect of each path."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from ... import __version__
from ...engine.text import ItemError
from ..doors.answering import json_of, results_of
from ..doors.dialects import DIALECTS, Dialect, DialectError
from ..doors.wire import halves
from . import openapi
from .compare import COMPARE, comparison
from .config import ServeConfig
from .metrics import Metrics
from .models import Models, Served
from .queue import Busy, ScoringQueue

T = TypeVar("T")
_PARAMETERS = ("aggregation", "model", "rendered", "value")
_POLICY = "default-src 'none'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
_GONE = 499  # nginx's status for a client that closed the connection; nobody reads it


class Refused(Exception):
    """A request that is answered with `status`, a message, and perhaps which field expected what."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None, **fields: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, **fields}}


class Server:
    """Everything behind the paths. `close` ends the scoring threads."""

    def __init__(self, config: ServeConfig, models: Models, token: str | None) -> None:
        self.config, self.models, self.token = config, models, token
        self.metrics = Metrics()
        self.queue = ScoringQueue(
            self.metrics,
            batch_tokens=config.batch_tokens,
            wait=config.wait_ms / 1000,
            max_queue=config.max_queue,
        )

    async def answer(self, request: Request, dialect: Dialect) -> Response:
        """Read, score and answer one request; every error becomes an answer too."""
        began = time.monotonic()
        try:
            reply = await self._reply(request, dialect)
            response = _json(200, reply)
        except Refused as error:
            response = _json(error.status, error.body, error.headers)
        self.metrics.requests.labels(dialect.name, str(response.status_code)).inc()
        self.metrics.seconds.labels(dialect.name).observe(time.monotonic() - began)
        return response

    async def _reply(self, request: Request, dialect: Dialect) -> Any:
        self.authorise(request)
        raw = await self._body(request)
        query = dict(request.query_params)
        try:
            unknown = next((name for name in query if name not in _PARAMETERS), None)
            if unknown is not None:
                raise DialectError(unknown, f"a query parameter among {', '.join(_PARAMETERS)}", "another one")
            asked = dialect.read(json_of(raw), query)
            model = self.models.chosen(query.get("model"), asked.model)
            spec = model.spec(asked.aggregation)
            self._check_size(asked.items)
            read, heads = await self._scored(request, model, asked.items, dialect) if asked.items else ([], None)
            results = [] if heads is None else results_of(model.scorer, read, heads, spec)
            self.metrics.scored(model.name, results)
            if dialect is COMPARE and heads is not None:
                return comparison(model, spec, heads, results)
            return asked.reply(results)
        except DialectError as error:
            fields = {"field": error.field, "expected": error.expected, "got": error.got}
            raise Refused(error.status, str(error), None, **fields) from None
        except ItemError as error:
            name = str(error).removeprefix("Scorer: ").partition(": ")[0]
            expected, got = halves(error.reason)
            raise Refused(422, f"{name}: {error.reason}", field=name, expected=expected, got=got) from None
        except RecursionError:
            fields = {"field": "body", "expected": "JSON of less depth", "got": "a deeper one"}
            raise Refused(422, "body: expected JSON of less depth", None, **fields) from None

    async def _scored(self, request: Request, model: Served, items: Sequence[Any], dialect: Dialect) -> Any:
        limit = self.config.timeout
        try:
            return await asyncio.wait_for(until_gone(request, self.queue.score(model, items)), limit)
        except Busy as error:
            raise Refused(dialect.busy, str(error), {"Retry-After": str(error.retry_after)}) from None
        except asyncio.TimeoutError:
            raise Refused(504, f"no score within {limit:g} s: the server is overloaded") from None
        except (ItemError, Refused):
            raise
        except Exception as error:  # of the model, such as a lack of memory; the log has its traceback
            raise Refused(500, f"scoring failed: {type(error).__name__}") from error

    def authorise(self, request: Request) -> None:
        """Raise Refused unless the request carries the token, compared in constant time."""
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise Refused(401, "expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    async def _body(self, request: Request) -> bytes:
        limit, seconds = self.config.max_body, self.config.read_timeout
        closing = {"Connection": "close"}  # the rest of the body is not read
        too_large = Refused(413, f"body: expected at most {limit} bytes, got more", closing)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        parts: list[bytes] = []

        async def receive() -> None:
            async for part in request.stream():
                parts.append(part)
                if sum(map(len, parts)) > limit:
                    raise too_large

        try:
            await asyncio.wait_for(receive(), seconds)
        except asyncio.TimeoutError:
            got = f"{sum(map(len, parts))} bytes"
            raise Refused(408, f"body: expected all of it within {seconds:g} s, got {got}", closing) from None
        except ClientDisconnect:
            raise Refused(_GONE, "the client went away") from None
        return b"".join(parts)

    def _check_size(self, items: Sequence[Any]) -> None:
        if len(items) > self.config.max_items:
            raise DialectError("body", f"at most {self.config.max_items} items", str(len(items)), 413)
        for index, item in enumerate(items):
            size = characters(item)
            if size > self.config.max_chars:
                raise DialectError(f"item {index}", f"at most {self.config.max_chars} characters", str(size), 413)

    def health(self) -> Response:
        """200 while the scoring thread runs, else 503."""
        models = {
            name: {"source": m.source, "heads": m.num_heads, "aggregation": str(m.aggregation)}
            for name, m in self.models.by_name.items()
        }
        alive = self.queue.alive
        body = {"status": "ok" if alive else "the scoring thread has ended", "version": __version__, "models": models}
        return _json(200 if alive else 503, body)


def make_app(server: Server) -> FastAPI:
    """The application: a path for each dialect, /compare, /health, /metrics, the page / and /openapi.json."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.queue.close)

    # no docs_url: FastAPI's pages load their scripts from a foreign host
    app = FastAPI(
        title="prudent serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description=openapi.ABOUT,
    )  # fmt: skip
    for dialect in (*DIALECTS, COMPARE):
        _mount(app, server, dialect)
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def look() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/health", summary="Whether the server can score, and its models.", responses=openapi.HEALTH)
    async def health() -> Response:
        return server.health()

    @app.get("/metrics", summary="Prometheus metrics.", responses=openapi.METRICS)
    async def metrics(request: Request) -> Response:
        server.authorise(request)
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _json(error.status, error.body, error.headers)

    @app.exception_handler(StarletteHTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return _json(error.status_code, {"error": {"message": str(error.detail)}}, error.headers)

    return app


def _mount(app: FastAPI, server: Server, dialect: Dialect) -> None:
    async def answer(request: Request) -> Response:
        return await server.answer(request, dialect)

    app.post(
        dialect.path,
        name=dialect.name,
        summary=dialect.summary,
        description=dialect.read.__doc__ or "",
        responses=openapi.responses(dialect),
        openapi_extra=openapi.request(dialect),
    )(answer)


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection. Raises Refused then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refused(_GONE, "the client went away")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # the end of a body may come as a message of its own


def characters(item: Any) -> int:
    """Characters in all texts of an item; a token id counts as one."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, Mapping):
        return sum(characters(value) for value in item.values())
    return sum(characters(value) for value in item) if isinstance(item, list) else 1


def _json(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Response:
    """A reply; it cannot hold NaN or infinity, which JSON lacks."""
    content = json.dumps(body, allow_nan=False)
    return Response(content, status, headers=dict(headers or {}), media_type="application/json")
