"""The streaming executor: reading, network, blending and writing overlap, in bounded memory.

Reader threads prepare batches ahead, the calling thread runs the network, one thread adds windows to the
partial sums in the plan's order, and writer threads finish, compress and write blocks. Every queue between
them is short, so memory holds a few batches, the partial sums within their budget, and a few blocks.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from volumen.inference.windows.blending import BlockAccumulator
from volumen.inference.windows.plan import PredictPlan
from volumen.utils.boxes import bounding_box

_SCATTERED = 16
"""How many times fewer windows the unfinished blocks must have than the box around them to be looked at one by one."""

Finished = tuple[tuple[int, ...], "np.ndarray | None", "list[tuple[slice, ...]]"]


@dataclass
class StreamCounts:
    """What a run did.

    Args:
        windows: windows computed.
        skipped: windows skipped.
        blocks: blocks written.
        seconds: of the first batches where windows are augmented, in the unaugmented pass and in all.
        overlaps: see `volumen.inference.gain.GainMeter`.
    """

    windows: int = 0
    skipped: int = 0
    blocks: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    overlaps: dict[str, np.ndarray] = field(default_factory=dict)


def needed_batches(plan: PredictPlan, done: np.ndarray | None) -> Iterator[range]:
    """Yield the batches with a window that touches an unfinished block.

    A batch is needed whole or not at all, so that every window is always computed in the same company:
    results of the same batch are the same bits.
    """
    if done is None:
        yield from plan.batches()
        return
    if done.all():
        return
    last = range(0)
    for position in _candidates(plan, done):
        if position not in last and not done[plan.touched(position)].all():
            last = plan.batch_of(position)
            yield last


def count_needed(plan: PredictPlan, done: np.ndarray) -> int:
    """Return how many windows `needed_batches` yields."""
    return sum(len(batch) for batch in needed_batches(plan, done)) if done.any() else len(plan)


def _candidates(plan: PredictPlan, done: np.ndarray) -> Iterable[int]:
    """Return, in order, the positions of windows among which are all that touch an unfinished block."""
    box = bounding_box(~done)
    todo = int(done.size - done.sum())
    around = plan.windows_touching(box)
    scattered = plan.windows_of_block(tuple(first for first, _ in box)) * todo * _SCATTERED
    if scattered >= math.prod(len(numbers) for numbers in around):
        return plan.positions(around)
    # Few blocks far apart, as those inside a sparse mask: the windows of each of them.
    return sorted(
        {
            position
            for block in np.argwhere(~done).tolist()
            for position in plan.positions(plan.windows_touching([(i, i + 1) for i in block]))
        }
    )


def stream(
    plan: PredictPlan,
    read: Callable[[int], np.ndarray | None],
    network: Callable[[np.ndarray], np.ndarray],
    accumulator: BlockAccumulator,
    finish: Callable[[Finished], None],
    *,
    done: np.ndarray | None = None,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> StreamCounts:
    """Predict every block that is not done.

    Args:
        plan: windows, order and blocks.
        read: gives the window at a position, or None to skip it; called from several threads.
        network: gives weighted outputs (B, K, *patch) for windows (B, C, *patch).
        accumulator: partial sums.
        finish: writes a completed block; called from several threads, once per block.
        done: blocks that are finished already, bool, shape `plan.blocks`.
        workers: threads that read, and as many that write.
        progress: called with the number of windows settled.

    Raises:
        Exception: the first one of any stage, after all threads have stopped.
    """
    counts = StreamCounts()
    lock = threading.Lock()
    threads = max(workers, 1)

    def prepare(batch: range) -> tuple[range, list[np.ndarray | None]]:
        return batch, [read(position) for position in batch]

    def finish_counted(block: Finished) -> None:
        finish(block)
        with lock:
            counts.blocks += 1

    with ExitStack() as stack:
        readers = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="read"))
        adder = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="blend"))
        writers = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="write"))
        # On an error, what is queued must not run on while the pools shut down.
        for pool in (readers, adder, writers):
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        writing: deque[Future[None]] = deque()

        def add(batch: range, skipped: set[int], outputs: np.ndarray | None) -> None:
            row = 0
            for position in batch:
                values = None
                if position not in skipped:
                    assert outputs is not None
                    values, row = outputs[row], row + 1
                for block in accumulator.add(position, values):
                    while len(writing) >= 2 * threads:
                        writing.popleft().result()
                    writing.append(writers.submit(finish_counted, block))

        adding: deque[Future[None]] = deque()
        for batch, windows in _ahead(readers, prepare, needed_batches(plan, done), threads + 1):
            present = [window for window in windows if window is not None]
            skipped = {p for p, window in zip(batch, windows, strict=True) if window is None}
            outputs = network(np.stack(present)) if present else None
            while len(adding) >= 2:
                adding.popleft().result()
            adding.append(adder.submit(add, batch, skipped, outputs))
            counts.windows += len(present)
            counts.skipped += len(skipped)
            if progress is not None:
                progress(len(batch))
        for future in adding:
            future.result()
        for future in writing:
            future.result()
    return counts


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[range], Any], jobs: Iterator[range], depth: int
) -> Iterator[Any]:
    """Yield the results of jobs in order while the next ones are worked on."""
    waiting: deque[Future[Any]] = deque()
    for job in jobs:
        waiting.append(pool.submit(work, job))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
