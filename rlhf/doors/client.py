"""Ask a reward server, `prudent serve` or vLLM with our model."""

from __future__ import annotations

import asyncio
import os
import urllib.parse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

from .http import Endpoint, check_url
from .vector_dialects import scores_of_vector

Scored: TypeAlias = dict[str, Any]

FORMS = {"score": "/score", "classify": "/classify", "pooling": "/pooling"}  # name -> end of the URL
_VECTOR = {"classify": "probs", "pooling": "data"}
_ITEMS = 256  # in one request


class RewardClient:
    """Score items on a server; errors are raised, and never become rewards.

    `score` and `score_async` return one dict an item, in the items' order: reward, mean, std (K floats each), distance
    if the model measures it, and from `/score` also nominal and worst; None for a number that is not finite.

    An item is a text, a list of messages, {"messages"}, or {"prompt", "response"}, as `Scorer` takes them. With
    `/classify` and `/pooling` a text is written by the reward model's chat template already, a prompt and a response
    that are texts become a user's and an assistant's message, and "complete": false cannot be said.

    A request that meets no server, a broken connection, 429 or 5xx is sent again after 1, 4 and 16 seconds, or after
    the server's Retry-After if that is longer; each such try is a warning in the log. The client can be pickled and may
    be called from several threads.

    Args:
        url: http://host:8000 for our own form, or with the path /score, /classify or /pooling.
        model: the name of a model there; None: the default.
        aggregation: how the heads become one reward; None: the model's own. vLLM itself ignores it.
        token: bearer token; None: the environment's PRUDENT_TOKEN, if it is set.
        timeout: seconds to wait for each answer.
        connections: requests of `score_async` under way at once.
        name: what errors call the URL.

    Raises:
        ValueError: for a wrong URL; from a call, if the server refuses the request or does not answer, or for an answer
            of another form.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        aggregation: str | None = None,
        token: str | None = None,
        timeout: float = 60.0,
        connections: int = 16,
        name: str = "url",
    ) -> None:
        check_url(name, url)
        parts = urllib.parse.urlsplit(url)
        self.form = form_of(url)
        if self.form not in FORMS and parts.path not in ("", "/"):
            raise ValueError(f"{name}: expected the path /score, /classify or /pooling, or none, got {url!r}")
        if self.form not in FORMS:
            self.form, parts = "score", parts._replace(path="/score")
        given = {"model": model, "aggregation": aggregation}
        added = urllib.parse.urlencode({key: value for key, value in given.items() if value is not None})
        self.url = parts._replace(query="&".join(filter(None, (parts.query, added)))).geturl()
        self.model, self.connections = model, connections
        self._endpoint = Endpoint(
            self.url, f"{name}: {self.url}", timeout=timeout, token=token_of(token), connections=connections
        )
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": None}

    def score(self, items: Iterable[Any]) -> list[Scored]:
        """Score all items, in requests of at most 256."""
        return [scored for body, count in self._requests(items) for scored in self._ask(body, count)]

    async def score_async(self, items: Iterable[Any]) -> list[Scored]:
        """`score` without blocking the event loop; the requests run in threads of the client."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.connections, thread_name_prefix="reward-client")
        loop = asyncio.get_running_loop()
        asked = [
            loop.run_in_executor(self._threads, partial(self._ask, body, count))
            for body, count in self._requests(items)
        ]
        return [scored for part in await asyncio.gather(*asked) for scored in part]

    def _requests(self, items: Iterable[Any]) -> list[tuple[dict[str, Any], int]]:
        """(body, number of items in it)."""
        if isinstance(items, (str, dict)):
            raise ValueError(f"items: expected a list of items, got {type(items).__name__}")
        items = list(items)
        if self.form == "score":
            parts = [items[start : start + _ITEMS] for start in range(0, len(items), _ITEMS)]
            return [({"items": part}, len(part)) for part in parts]
        bodies: list[tuple[dict[str, Any], int]] = []
        for index, item in enumerate(items):
            given = _vector_input(item, index)
            texts = bodies[-1][0].get("input") if bodies else None
            if isinstance(given, str) and texts is not None and len(texts) < _ITEMS:
                texts.append(given)
                bodies[-1] = (bodies[-1][0], len(texts))
            else:
                body: dict[str, Any] = {"input": [given]} if isinstance(given, str) else {"messages": given}
                bodies.append(({**body, **({} if self.model is None else {"model": self.model})}, 1))
        return bodies

    def _ask(self, body: dict[str, Any], count: int) -> list[Scored]:
        answer, where = self._endpoint.post(body), self._endpoint.where
        key = "scores" if self.form == "score" else "data"
        parts = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(parts, list) or len(parts) != count or not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{where}: expected {key}, a list of {count} objects, got {answer!r:.200}")
        if self.form == "score":
            if any("reward" not in part for part in parts):
                raise ValueError(f"{where}: expected a reward in every score, got {answer!r:.200}")
            return parts
        ordered = sorted(parts, key=lambda part: part.get("index", 0))
        return [scores_of_vector(part.get(_VECTOR[self.form]), f"{where}: {_VECTOR[self.form]}") for part in ordered]


def form_of(url: str) -> str:
    """The key of `FORMS` that the URL's path ends with; the path itself for another one."""
    path = urllib.parse.urlsplit(url).path.rstrip("/")
    return next((form for form, end in FORMS.items() if path.endswith(end)), path)


def token_of(token: str | None) -> str | None:
    """`token`, or the environment's PRUDENT_TOKEN."""
    return token or os.environ.get("PRUDENT_TOKEN") or None


def _vector_input(item: Any, index: int) -> str | list[Any]:
    """A text, or messages."""
    if isinstance(item, (str, list)):
        return item
    if not isinstance(item, dict):
        raise ValueError(f"items[{index}]: expected a text, messages or an object, got {type(item).__name__}")
    if item.get("complete") is False:
        raise ValueError(f"items[{index}]: expected a complete response, because the form cannot say that it is not")
    prompt, response, tools = item.get("prompt"), item.get("response", []), item.get("tools")
    if isinstance(prompt, dict) and "messages" in prompt:
        prompt, tools = prompt["messages"], prompt.get("tools")
    elif isinstance(prompt, dict):
        system = [{"role": "system", "content": prompt["system"]}]
        prompt = [*system, {"role": "user", "content": prompt["text"]}]
    if tools:
        raise ValueError(f"items[{index}]: expected no tools, because the form has none, got {len(tools)}")
    turns = item.get("messages", prompt)
    return [*_turns(turns, "user"), *_turns(response, "assistant")]


def _turns(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)
