"""The wire dialects on vLLM's own server (`vllm.endpoint_plugins`): vLLM loads it with VLLM_PLUGINS=prudent."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from torch import Tensor
from vllm import PoolingParams

from ....engine import EnsembleRewardConfig
from ....engine.text import Encoded
from ..answering import json_of, read_items, results_of, spec_of
from ..dialects import DIALECTS, Dialect, DialectError
from .pooling import START
from .scorer import heads_of, is_ours, open_scorer, served_ids

_GONE = 499  # nginx's status for a client that closed the connection; nobody reads it


class RewardEndpoints:
    """vLLM's `EndpointPlugin`: every dialect of `dialects.DIALECTS`, for a server of one of our reward models.

    Items are encoded here as `Scorer` encodes them (EOS, chat template, truncation), and vLLM gets token ids. So
    `/classify`, `/pooling`, `/score` and `/v1/embeddings` replace vLLM's own, which would leave out the EOS token. A
    server of another model keeps its routes.

    With `--api-key` or VLLM_API_KEY every one of these paths asks for the bearer token.
    """

    name = "prudent"
    required_tasks = ("classify",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._scorer: Any = None
        self._keys: list[bytes] = []

    def attach_router(self, app: FastAPI) -> None:
        """Mount the dialects in place of vLLM's routes of the same paths."""
        args = app.state.args
        if not is_ours(args.model, getattr(args, "revision", None)):
            return
        paths = {dialect.path for dialect in DIALECTS}
        app.router.routes[:] = [route for route in app.router.routes if not _answers(route, paths)]
        for dialect in DIALECTS:
            self._mount(app, dialect)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine; read the tokeniser and the heads' calibration from the model's folder."""
        if engine_client is None or not isinstance(engine_client.model_config.hf_config, EnsembleRewardConfig):
            return
        self._engine = engine_client
        self._keys = [key.encode() for key in (args.api_key or [os.environ.get("VLLM_API_KEY", "")]) if key]
        self._scorer = await asyncio.to_thread(open_scorer, engine_client.model_config)

    def _mount(self, app: FastAPI, dialect: Dialect) -> None:
        async def answer(request: Request) -> Response:
            return await self._answer(request, dialect)

        app.post(dialect.path, name=f"prudent {dialect.name}", summary=dialect.summary)(answer)

    async def _answer(self, request: Request, dialect: Dialect) -> Response:
        if not self._authorised(request.headers.get("authorization", "")):
            message = "expected the header Authorization: Bearer TOKEN"
            return _json(401, {"error": {"message": message}}, {"WWW-Authenticate": "Bearer"})
        try:
            return _json(200, await self._reply(request, dialect))
        except DialectError as error:
            fields = {"field": error.field, "expected": error.expected, "got": error.got}
            return _json(error.status, {"error": {"message": str(error), **fields}})
        except _Gone:
            return Response(status_code=_GONE)

    async def _reply(self, request: Request, dialect: Dialect) -> Any:
        scorer, body = self._scorer, json_of(await request.body())
        asked = dialect.read(body, dict(request.query_params))
        spec = spec_of(scorer, asked.aggregation)
        if not asked.items:
            return asked.reply([])
        read = await asyncio.to_thread(read_items, scorer, asked.items)
        rows = await _until_gone(request, self._run(read))
        head = scorer.model.score
        heads = heads_of(rows, head.num_heads, measures=head.trust is not None)
        return asked.reply(results_of(scorer, read, heads, spec))

    async def _run(self, read: Sequence[Encoded]) -> list[Tensor]:
        """One vector an item, [2K + 1] or [2K + 2] on the CPU; all go to the engine at once."""
        request_id = f"prudent-{uuid.uuid4().hex}"
        parts = (self._one(item, f"{request_id}-{index}") for index, item in enumerate(read))
        return list(await asyncio.gather(*parts))

    async def _one(self, item: Encoded, request_id: str) -> Tensor:
        """The vector of one item. A model that reads the response finds none of it in the prefix cache (`TapPool`), so
        a response that vLLM has cached, as one that is asked for again, is computed once more."""
        reads = self._scorer.model.config.reads_response
        given = {"extra_kwargs": {START: item.start}} if reads else {}
        vector = await self._encoded(item, request_id, PoolingParams(task="classify", **given))
        if reads and bool(vector.isnan().any()):
            params = PoolingParams(task="classify", skip_reading_prefix_cache=True, **given)
            vector = await self._encoded(item, f"{request_id}-again", params)
        return vector

    async def _encoded(self, item: Encoded, request_id: str, params: PoolingParams) -> Tensor:
        prompt = {"prompt_token_ids": served_ids(self._scorer, item.ids)}
        found = None
        async for output in self._engine.encode(prompt, params, request_id):
            found = output
        assert found is not None
        data: Tensor = found.outputs.data
        return data

    def _authorised(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        same = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return not self._keys or (scheme.lower() == "bearer" and any(same))


class _Gone(Exception):
    """The client closed its connection."""


async def _until_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled when the client closes its connection. Raises _Gone then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body is read, so the next message is the connection's end
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _Gone
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


def _answers(route: Any, paths: set[str]) -> bool:
    """Whether one of vLLM's routes answers POST on one of `paths`."""
    return isinstance(route, APIRoute) and route.path in paths and "POST" in (route.methods or ())


def _json(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Response:
    """A reply; it cannot hold NaN or infinity, which JSON lacks."""
    content = json.dumps(body, allow_nan=False)
    return Response(content, status, headers=dict(headers or {}), media_type="application/json")
