"""Divides a volume among workers into boxes of output blocks, each with the windows that touch it.

A worker computes every window that touches one of its blocks, even if a neighbour computes that window too. So one
worker sums all windows of a block, always in the same order, and the result is bitwise the same for every partition.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from volumen.inference.windows.plan import Box, PredictPlan
from volumen.utils.boxes import bounding_box

MOST_SHARDS_PER_WORKER = 4
SLACK = 1.1
"""Among the partitions that take at most this many times the time of the fastest one, the one with the most shards is
chosen, since the real work of a shard is unknown in advance: empty windows are skipped."""


@dataclass(frozen=True)
class Shard:
    """A box of blocks that one worker computes.

    Args:
        blocks: start and stop per axis, in blocks.
        windows: number of windows that touch it.
    """

    blocks: Box
    windows: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """Slices of the shard in an array of blocks."""
        return tuple(slice(first, stop) for first, stop in self.blocks)


def partition_blocks(plan: PredictPlan, workers: int, done: np.ndarray | None = None) -> tuple[Shard, ...]:
    """Divide the unfinished blocks into shards, the largest first.

    The largest shard is halved repeatedly, across the axis on which the fewest windows cross the cut. More shards
    balance the load better, but repeat more windows; the number is chosen at which the last worker finishes earliest.

    Args:
        plan: windows and blocks.
        workers: number of workers, at least 1.
        done: blocks that are already finished, bool, shape `plan.blocks`.
    """
    todo = np.ones(plan.blocks, dtype=bool) if done is None else ~done
    whole = _shard(plan, todo, tuple((0, n) for n in plan.blocks))
    shards: tuple[Shard, ...] = () if whole is None else (whole,)
    ways = [shards]
    while 0 < len(shards) < MOST_SHARDS_PER_WORKER * workers:
        halves = _halve(plan, todo, shards[0])
        if not halves:
            break
        shards = tuple(sorted((*shards[1:], *halves), key=lambda shard: -shard.windows))
        ways.append(shards)
    longest = [_time(shards, workers) for shards in ways]
    return max((way for way, time in zip(ways, longest) if time <= SLACK * min(longest)), key=len)


def _time(shards: tuple[Shard, ...], workers: int) -> int:
    """Return the windows of the busiest worker, if each worker takes the next shard when it becomes free."""
    busy = [0] * workers
    for shard in shards:
        heapq.heapreplace(busy, busy[0] + shard.windows)
    return max(busy)


def _halve(plan: PredictPlan, todo: np.ndarray, shard: Shard) -> list[Shard]:
    """Return the halves with the smallest sum of windows; empty if a half has as many windows as the whole."""
    choices = []
    for axis, (first, stop) in enumerate(shard.blocks):
        middle = (first + stop) // 2
        if middle == first:
            continue
        halves = [
            _shard(plan, todo, (*shard.blocks[:axis], side, *shard.blocks[axis + 1 :]))
            for side in ((first, middle), (middle, stop))
        ]
        unfinished = [half for half in halves if half is not None]
        if all(half.windows < shard.windows for half in unfinished):
            choices.append(unfinished)
    return min(choices, key=lambda halves: sum(half.windows for half in halves), default=[])


def _shard(plan: PredictPlan, todo: np.ndarray, blocks: Box) -> Shard | None:
    """Return the shard of the unfinished blocks in a box; None if all are finished."""
    here = todo[tuple(slice(first, stop) for first, stop in blocks)]
    if not here.any():
        return None
    inside = bounding_box(here)
    tight = tuple((low + a, low + b) for (low, _), (a, b) in zip(blocks, inside, strict=True))
    return Shard(tight, math.prod(len(numbers) for numbers in plan.windows_touching(tight)))
