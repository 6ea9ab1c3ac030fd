"""How a volume is shared among workers: boxes of output blocks, each with the windows that touch it.

A worker computes every window that touches a block of its own, also where the neighbour computes it too: the sums
of a block are then formed in one place and in one order, and are the same bits however the volume is cut.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from volumen.inference.windows.plan import Box, PredictPlan
from volumen.utils.boxes import bounding_box

MOST_PIECES_PER_WORKER = 4
SLACK = 1.1
"""Of the ways to cut that take at most this much longer than the fastest, the one with the most pieces is taken:
their work is known only when it is done, since empty windows are skipped."""


@dataclass(frozen=True)
class Piece:
    """A box of blocks that one worker finishes.

    Args:
        blocks: start and stop per axis, in blocks.
        windows: windows that touch it.
    """

    blocks: Box
    windows: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """The piece in an array of blocks."""
        return tuple(slice(first, stop) for first, stop in self.blocks)


def split_blocks(plan: PredictPlan, workers: int, done: np.ndarray | None = None) -> tuple[Piece, ...]:
    """Cut the unfinished blocks into pieces, the largest first.

    The largest piece is halved again and again, across the axis on which the fewest windows stand on the cut. More
    pieces balance better and repeat more windows; the number is taken at which the last worker is ready first.

    Args:
        plan: windows and blocks.
        workers: how many work at once, at least 1.
        done: blocks that are finished already, bool, shape `plan.blocks`.
    """
    todo = np.ones(plan.blocks, dtype=bool) if done is None else ~done
    whole = _piece(plan, todo, tuple((0, n) for n in plan.blocks))
    pieces: tuple[Piece, ...] = () if whole is None else (whole,)
    ways = [pieces]
    while 0 < len(pieces) < MOST_PIECES_PER_WORKER * workers:
        halves = _halve(plan, todo, pieces[0])
        if not halves:
            break
        pieces = tuple(sorted((*pieces[1:], *halves), key=lambda piece: -piece.windows))
        ways.append(pieces)
    longest = [_time(pieces, workers) for pieces in ways]
    return max((way for way, time in zip(ways, longest) if time <= SLACK * min(longest)), key=len)


def _time(pieces: tuple[Piece, ...], workers: int) -> int:
    """Return the windows that the busiest worker computes when each takes the next piece as it gets free."""
    busy = [0] * workers
    for piece in pieces:
        heapq.heapreplace(busy, busy[0] + piece.windows)
    return max(busy)


def _halve(plan: PredictPlan, todo: np.ndarray, piece: Piece) -> list[Piece]:
    """Return the halves with the fewest windows together; none where no half has fewer than the whole."""
    choices = []
    for axis, (first, stop) in enumerate(piece.blocks):
        middle = (first + stop) // 2
        if middle == first:
            continue
        halves = [
            _piece(plan, todo, (*piece.blocks[:axis], side, *piece.blocks[axis + 1 :]))
            for side in ((first, middle), (middle, stop))
        ]
        kept = [half for half in halves if half is not None]
        if all(half.windows < piece.windows for half in kept):
            choices.append(kept)
    return min(choices, key=lambda halves: sum(half.windows for half in halves), default=[])


def _piece(plan: PredictPlan, todo: np.ndarray, blocks: Box) -> Piece | None:
    """Return the piece of the unfinished blocks in a box, None where all are finished."""
    here = todo[tuple(slice(first, stop) for first, stop in blocks)]
    if not here.any():
        return None
    inside = bounding_box(here)
    tight = tuple((low + a, low + b) for (low, _), (a, b) in zip(blocks, inside, strict=True))
    return Piece(tight, math.prod(len(numbers) for numbers in plan.windows_touching(tight)))
