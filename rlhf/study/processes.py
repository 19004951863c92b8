"""Do independent tasks of a study in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm


def in_processes(work: Any, tasks: list[tuple[Any, ...]], processes: int, name: str, progress: bool) -> Iterator[Any]:
    """Return the results of `work(*task)` in the tasks' order, computed here or in processes of one thread each."""
    results: list[Any] = [None] * len(tasks)
    with tqdm(total=len(tasks), desc=name, disable=not progress) as bar:
        if processes == 1:
            for number, task in enumerate(tasks):
                results[number] = work(*task)
                bar.update()
            return iter(results)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        context = get_context("spawn")  # a forked process would inherit thread pools without their threads
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
            futures = {pool.submit(work, *task): number for number, task in enumerate(tasks)}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return iter(results)
