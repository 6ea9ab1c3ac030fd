"""Runs work in threads of this process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 4
"""Items queued per thread, so that no thread waits while the caller processes a result."""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(job: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """Yield the results of a job as they come, a few items ahead of the caller at most.

    Args:
        job: called with each item.
        items: the items to process.
        num_threads: 1 works in the calling thread.

    Raises:
        Exception: the first error of a job. Items that have not started then, or when the caller stops, are dropped.
    """
    if num_threads <= 1 or (isinstance(items, Sized) and len(items) <= 1):
        yield from map(job, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        pending: set[Future[Result]] = set()
        queue = iter(items)
        try:
            while True:
                free = _AHEAD * num_threads - len(pending)
                pending |= {pool.submit(job, item) for item in itertools.islice(queue, free)}
                if not pending:
                    return
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
