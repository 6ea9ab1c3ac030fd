"""The streaming executor: reads, predicts, blends and writes at the same time, in bounded memory.

Reader threads prepare batches in advance, the calling thread runs the network, one thread adds windows to the
partial sums in the plan's order, and writer threads convert, compress and write blocks. Every queue between
them is short, so that memory holds a few batches, the partial sums within their budget, and a few blocks.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from volumen.inference.windows.blending import BlockAccumulator
from volumen.inference.windows.joining import BlockJoiner
from volumen.inference.windows.plan import PredictPlan
from volumen.utils.boxes import bounding_box

_SCATTERED = 16
"""The unfinished blocks are searched one by one if their windows are this many times fewer than those of the box around
them."""

Finished = tuple[tuple[int, ...], Any, "list[tuple[slice, ...]]"]
"""A block's number, its weighted sums (an array, a tensor, or None if all of it is empty), and its empty parts."""


@dataclass
class StreamCounts:
    """Counts of a run.

    Args:
        windows: windows computed.
        skipped: windows skipped.
        blocks: blocks written.
        seconds: time of the first batches in the unaugmented pass and in all passes; 0 without augmentation.
        overlaps: see `volumen.inference.gain.GainMeter`.
    """

    windows: int = 0
    skipped: int = 0
    blocks: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    overlaps: dict[str, np.ndarray] = field(default_factory=dict)


def needed_batches(plan: PredictPlan, done: np.ndarray | None) -> Iterator[range]:
    """Yield the batches with a window that touches an unfinished block.

    A batch is computed completely or not at all, so that a window is always in the same batch: its result can depend
    on the batch in the last bits.
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
    # Few blocks far apart, for example inside a sparse mask: only the windows of each block.
    return sorted(
        {
            position
            for block in np.argwhere(~done).tolist()
            for position in plan.positions(plan.windows_touching([(i, i + 1) for i in block]))
        }
    )


@dataclass(frozen=True)
class Lane:
    """One network's way through a volume; an ensemble has one for each member.

    Args:
        plan: windows, order and blocks.
        read: returns the window at a position, or None to skip it; called from several threads.
        network: returns weighted outputs (B, K, *patch) for windows (B, C, *patch): arrays, or tensors if the
            accumulator lies on a device.
        accumulator: partial sums.
    """

    plan: PredictPlan
    read: Callable[[int], np.ndarray | None]
    network: Callable[[np.ndarray], Any]
    accumulator: BlockAccumulator


def interleaved(
    plans: Sequence[PredictPlan], done: np.ndarray | None, run: int = 1
) -> Iterator[tuple[int, range]]:
    """Yield the batches of several networks in turn, so that all networks advance at the same rate.

    Args:
        plans: windows of each network.
        done: blocks that are already finished.
        run: number of consecutive batches of one network.

    Yields:
        Number of the network and the batch; the next network is the one with the smallest share of finished windows.
    """
    if len(plans) == 1:
        yield from ((0, batch) for batch in needed_batches(plans[0], done))
        return
    nothing = np.zeros(plans[0].blocks, bool)
    totals = [max(1, count_needed(plan, nothing if done is None else done)) for plan in plans]
    batches = [needed_batches(plan, done) for plan in plans]
    finished = dict.fromkeys(range(len(plans)), 0)
    while finished:
        lane = min(finished, key=lambda number: (finished[number] / totals[number], number))
        for batch in itertools.islice(batches[lane], run):
            finished[lane] += len(batch)
            yield lane, batch
        if finished[lane] >= totals[lane]:
            del finished[lane]


def stream(
    lanes: Sequence[Lane],
    finish: Callable[[Finished], None],
    *,
    join: BlockJoiner | None = None,
    done: np.ndarray | None = None,
    workers: int = 2,
    run: int = 1,
    progress: Callable[[int], None] | None = None,
) -> StreamCounts:
    """Predict every block that is not done.

    Args:
        lanes: the network, or those of an ensemble, which have the same blocks.
        finish: writes a completed block; called from several threads, once per block.
        join: averages the blocks of several lanes; None for one lane.
        done: blocks that are already finished, bool, shape `plan.blocks`.
        workers: number of threads that read, and of those that write.
        run: number of consecutive batches of one lane.
        progress: called with the number of windows finished.

    Raises:
        Exception: the first exception of any stage, after all threads have stopped.
    """
    counts = StreamCounts()
    lock = threading.Lock()
    threads = max(workers, 1)

    def prepare(job: tuple[int, range]) -> tuple[int, range, list[np.ndarray | None]]:
        lane, batch = job
        return lane, batch, [lanes[lane].read(position) for position in batch]

    def finish_counted(block: Finished) -> None:
        finish(block)
        with lock:
            counts.blocks += 1

    with ExitStack() as stack:
        readers = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="read"))
        adder = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="blend"))
        writers = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="write"))
        # On an error, queued tasks must not start while the pools shut down.
        for pool in (readers, adder, writers):
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        writing: deque[Future[None]] = deque()

        def add(lane: int, batch: range, skipped: set[int], outputs: Any) -> None:
            row = 0
            for position in batch:
                values = None
                if position not in skipped:
                    assert outputs is not None
                    values, row = outputs[row], row + 1
                for own in lanes[lane].accumulator.add(position, values):
                    block = own if join is None else join.add(lane, *own)
                    if block is None:
                        continue
                    while len(writing) >= 2 * threads:
                        writing.popleft().result()
                    writing.append(writers.submit(finish_counted, block))

        adding: deque[Future[None]] = deque()
        jobs = interleaved([lane.plan for lane in lanes], done, run)
        for lane, batch, windows in _ahead(readers, prepare, jobs, threads + 1):
            present = [window for window in windows if window is not None]
            skipped = {p for p, window in zip(batch, windows, strict=True) if window is None}
            outputs = lanes[lane].network(_stacked(present)) if present else None
            while len(adding) >= 2:
                adding.popleft().result()
            adding.append(adder.submit(add, lane, batch, skipped, outputs))
            counts.windows += len(present)
            counts.skipped += len(skipped)
            if progress is not None:
                progress(len(batch))
        for future in adding:
            future.result()
        for future in writing:
            future.result()
    return counts


def _stacked(windows: list[np.ndarray]) -> np.ndarray:
    """Return windows (C, *patch) as one array (B, C, *patch), a view of a single one."""
    return windows[0][None] if len(windows) == 1 else np.stack(windows)


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], jobs: Iterator[Any], depth: int
) -> Iterator[Any]:
    """Yield the results of jobs in order, while threads compute the next ones."""
    waiting: deque[Future[Any]] = deque()
    for job in jobs:
        waiting.append(pool.submit(work, job))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
