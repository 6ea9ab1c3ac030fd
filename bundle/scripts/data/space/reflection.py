"""Pads an image beyond its border by reflection at its outermost voxels.

A network with instance normalisation divides by the statistics of its input. Padding with a constant changes mean and
standard deviation compared with the training images; padding by reflection hardly does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def reflected_positions(start: int, count: int, size: int) -> np.ndarray:
    """Return the index of the reflected voxel at each of `count` positions of an axis, beginning at `start`.

    The outermost voxels are not repeated, as in `numpy.pad(mode="reflect")`; positions farther out than the length of
    the axis are reflected again. An axis of one voxel is constant.

    Args:
        start: first position; may be negative.
        count: number of positions.
        size: voxels of the axis, at least 1.

    Returns:
        int64 (count,), each in 0 to size - 1.
    """
    period = max(2 * (size - 1), 1)
    position = np.arange(start, start + count) % period
    return np.minimum(position, period - position) if size > 1 else np.zeros(count, np.int64)


def reflect(values: np.ndarray, starts: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Return a box of an image that may reach beyond the image's borders.

    Args:
        values: the image (C, *space).
        starts: first voxel of the box per spatial axis, in voxels of `values`; may be negative.
        shape: voxels of the box per spatial axis.

    Returns:
        (C, *shape); a view of `values` if the box lies inside it.
    """
    for axis, (start, count) in enumerate(zip(starts, shape, strict=True), start=1):
        size = values.shape[axis]
        if start >= 0 and start + count <= size:
            values = values[(slice(None),) * axis + (slice(start, start + count),)]
        else:
            values = values.take(reflected_positions(start, count, size), axis=axis)
    return values
