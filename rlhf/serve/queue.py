"""Dynamic batching: items of all requests wait a few milliseconds for each other and are scored together."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ...engine import HeadScores
from ...engine.text import Encoded
from .metrics import Metrics
from .models import Served

logger = logging.getLogger(__name__)
_SLOWEST = 60  # seconds; the longest Retry-After


class Busy(Exception):
    """The queue is full. `retry_after`: seconds after which it will probably have room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: ask again in {retry_after} s")
        self.retry_after = retry_after


class _Job:
    """A request's items: `read` is what the model reads, `rows` what it said of the first `len(rows)` of them."""

    def __init__(self, model: Served, items: Sequence[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.model, self.items, self.loop = model, items, loop
        self.read: list[Encoded] = []
        self.taken = 0
        self.rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.since = time.monotonic()
        self.dropped = False
        self.future: asyncio.Future[HeadScores] = loop.create_future()

    def answer(self, found: HeadScores | BaseException) -> None:
        """Hand the result to the event loop; a job that was dropped or has one already gets none."""
        self.loop.call_soon_threadsafe(self._set, found)

    def _set(self, found: HeadScores | BaseException) -> None:
        if self.future.done():
            return
        if isinstance(found, BaseException):
            self.future.set_exception(found)
        else:
            self.future.set_result(found)


class ScoringQueue:
    """One thread tokenises, one runs the models; requests wait in the order in which they came.

    A batch takes items of the oldest request and of others of its model, up to `batch_tokens`; it begins as soon as
    they are that many, or when the oldest has waited for `wait` seconds. A request that is cancelled leaves the
    queue; only what is being computed for it at that moment is lost.
    """

    def __init__(self, metrics: Metrics, *, batch_tokens: int, wait: float, max_queue: int) -> None:
        self._metrics, self._batch_tokens, self._wait, self._max_queue = metrics, batch_tokens, wait, max_queue
        self._jobs: deque[_Job] = deque()
        self._ready = threading.Condition()
        self._waiting = 0  # items admitted and not yet answered or dropped
        self._per_item = 0.05  # seconds, a running mean
        self._stopping = False
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="tokenising")
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()
        metrics.queue_items.set_function(lambda: self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the scoring thread runs."""
        return self._thread.is_alive()

    async def score(self, model: Served, items: Sequence[Any]) -> tuple[list[Encoded], HeadScores]:
        """What the model reads of the items, and what its heads say.

        Raises:
            Busy: if the queue has no room for them.
            ItemError: for an item that cannot be read, which it names by its index.
        """
        with self._ready:
            if self._waiting and self._waiting + len(items) > self._max_queue:
                raise Busy(max(1, min(_SLOWEST, math.ceil(self._waiting * self._per_item))))
            self._waiting += len(items)
        job = _Job(model, items, asyncio.get_running_loop())
        try:
            await asyncio.get_running_loop().run_in_executor(self._tokenising, self._tokenise, job)
            with self._ready:
                self._jobs.append(job)
                self._ready.notify()
            return job.read, await job.future
        except asyncio.CancelledError:
            self._metrics.dropped.inc(len(items))
            raise
        finally:
            with self._ready:
                self._waiting -= len(items)
                job.dropped = True

    def close(self) -> None:
        """End the threads once the jobs in the queue are done."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._thread.join()
        self._tokenising.shutdown()

    def _tokenise(self, job: _Job) -> None:
        for index, item in enumerate(job.items):
            if job.dropped:
                return
            job.read.append(job.model.scorer.read(item, f"item {index}"))

    def _run(self) -> None:
        while True:
            with self._ready:
                batch = self._next_batch()
            if batch is None:
                return
            self._score(batch)

    def _next_batch(self) -> list[tuple[_Job, Encoded]] | None:
        """Wait for items, and for others to join them; None at the end."""
        while True:
            while self._jobs and self._jobs[0].dropped:
                self._jobs.popleft()
            if not self._jobs:
                if self._stopping:
                    return None
                self._ready.wait()
                continue
            oldest = self._jobs[0]
            left = oldest.since + self._wait - time.monotonic()
            if left <= 0 or self._stopping or self._tokens(oldest.model) >= self._batch_tokens:
                return self._take(oldest.model)
            self._ready.wait(left)

    def _tokens(self, model: Served) -> int:
        return sum(len(item.ids) for job in self._jobs if job.model is model for item in job.read[job.taken :])

    def _take(self, model: Served) -> list[tuple[_Job, Encoded]]:
        batch: list[tuple[_Job, Encoded]] = []
        left = self._batch_tokens
        for job in [job for job in self._jobs if job.model is model and not job.dropped]:
            while job.taken < len(job.read) and (left >= len(job.read[job.taken].ids) or not batch):
                batch.append((job, job.read[job.taken]))
                left -= len(job.read[job.taken].ids)
                job.taken += 1
            if job.taken == len(job.read):
                self._jobs.remove(job)
            if left <= 0:
                break
        return batch

    def _score(self, batch: list[tuple[_Job, Encoded]]) -> None:
        model, began = batch[0][0].model, time.monotonic()
        jobs = list(dict.fromkeys(job for job, _ in batch))
        try:
            heads = model.scorer.heads([item for _, item in batch])
        except Exception as error:  # such as a lack of memory: the next batch may fit
            logger.exception("scoring failed")
            for job in jobs:
                job.answer(error)
                job.dropped = True
            return
        seconds = time.monotonic() - began
        self._per_item += 0.1 * (seconds / len(batch) - self._per_item)
        self._metrics.batch(model.name, [len(item.ids) for _, item in batch], seconds)
        for row, (job, _) in enumerate(batch):
            far = None if heads.distance is None else heads.distance[row]
            job.rows.append((heads.mean[row], heads.std[row], far))
        for job in jobs:
            if len(job.rows) == len(job.read):
                job.answer(_stacked(job))


def _stacked(job: _Job) -> HeadScores:
    mean, std, distance = zip(*job.rows, strict=True)
    far = None if distance[0] is None else torch.stack(distance)
    truncated = sum(item.truncated for item in job.read)
    return HeadScores(torch.stack(mean), torch.stack(std), far, truncated)
