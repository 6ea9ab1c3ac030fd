"""Boxes: axis-aligned regions of a volume, in voxels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Box = tuple[tuple[int, int], ...]
"""(start, stop) per spatial axis, in the volume's axis order; stop is exclusive."""


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box that covers a volume of this spatial shape."""
    return tuple((0, int(size)) for size in shape)


def box_extent(box: Box) -> tuple[int, ...]:
    """Return the box's size in voxels per axis."""
    return tuple(stop - start for start, stop in box)


def box_of(region: Sequence[slice]) -> Box:
    """Return the box of a region given by slices."""
    return tuple((part.start, part.stop) for part in region)


def box_text(box: Box) -> str:
    """Format a box for messages: 0:64 x 32:96."""
    return " x ".join(f"{start}:{stop}" for start, stop in box)


def bounding_box(where: np.ndarray) -> Box:
    """Return the smallest box that holds all true elements; (0, 0) along every axis if there are none."""
    sides = []
    for axis in range(where.ndim):
        along = np.flatnonzero(where.any(axis=tuple(other for other in range(where.ndim) if other != axis)))
        sides.append((int(along[0]), int(along[-1]) + 1) if along.size else (0, 0))
    return tuple(sides)


def cells_in_ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the cells of a grid that lie in any of some boxes of cells, without repetition.

    Args:
        first, last: (N, D) first and last cell of each box; a box may be empty.

    Returns:
        (M, D) indices in lexicographic order.
    """
    some = (last >= first).all(axis=1)
    # Many boxes are alike, as of small tiles in large cells.
    boxes = np.unique(np.concatenate([first[some], last[some]], axis=1), axis=0)
    first, last = np.split(boxes, 2, axis=1)
    most = (last - first).max(axis=0, initial=0) + 1
    if math.prod(int(n) for n in most) > len(first):
        # Few boxes, or large ones: box by box.
        ranges = [
            [np.arange(a, b + 1) for a, b in zip(low, high)]
            for low, high in zip(first.tolist(), last.tolist())
        ]
        parts = [np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)) for axes in ranges]
    else:
        steps = itertools.product(*(range(int(n)) for n in most))
        parts = [np.minimum(first + np.array(step), last) for step in steps]
    return np.unique(np.concatenate([first[:0], *parts]), axis=0)
