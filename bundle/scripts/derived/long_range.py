"""Chooses offsets of affinities that reach as far as objects do, by voxel size and object size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

STEPS = (3, 9, 27)
"""Long offsets in voxels of the finest axis, as in Lee et al. 2017 (arXiv:1706.00120)."""


def long_range_offsets(spacing: Sequence[float], width: Sequence[float] | None = None) -> list[list[int]]:
    """Return the previous voxel along each axis, then the offsets 3, 9 and 27 along each axis.

    The long ones are lengths: 3, 9 and 27 voxels of the finest axis, rounded to voxels of their axis. One of less than
    2 voxels is left out, and one that is longer than objects are wide: it would join nothing.

    Args:
        spacing: voxel size per spatial axis.
        width: typical width of objects per axis, in voxels; None for any.
    """
    axes = range(len(spacing))
    found = [[-int(axis == other) for other in axes] for axis in axes]
    for step in STEPS:
        for axis in axes:
            voxels = round(step * min(spacing) / spacing[axis])
            offset = [-voxels * int(axis == other) for other in axes]
            fits = width is None or voxels <= width[axis]
            if voxels >= 2 and fits and offset not in found:
                found.append(offset)
    return found


def chord_counts(labels: np.ndarray) -> tuple[int, list[int]]:
    """Return the voxels of objects, and along each axis the number of stretches of one object that they form.

    Args:
        labels: integer (*spatial), 0 is background; equal numbers that touch are one object.
    """
    import numpy as np

    inside = labels > 0
    runs = []
    for axis in range(labels.ndim):
        lines, there = np.moveaxis(labels, axis, 0), np.moveaxis(inside, axis, 0)
        begins = there[1:] & (lines[1:] != lines[:-1])
        runs.append(int(there[0].sum() + begins.sum()))
    return int(inside.sum()), runs
