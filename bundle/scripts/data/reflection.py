"""Voxels beyond the border of an image, as if a mirror stood in its outermost voxels.

Networks with instance normalisation divide by what they see: a window filled up with a constant has another mean and
another deviation than the images that the network was trained on, a window filled up with reflected voxels has not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def reflected_positions(start: int, count: int, size: int) -> np.ndarray:
    """Return which voxel of an axis stands at each of `count` positions from `start` on.

    The outermost voxels are not repeated, as of `numpy.pad(mode="reflect")`; positions farther out than the axis is
    long are reflected again. An axis of one voxel is constant.

    Args:
        start: first position, maybe below 0.
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
        starts: first voxel of the box per spatial axis, in voxels of `values`, maybe below 0.
        shape: voxels of the box per spatial axis.

    Returns:
        (C, *shape); a view of `values` where the box lies inside it.
    """
    for axis, (start, count) in enumerate(zip(starts, shape, strict=True), start=1):
        size = values.shape[axis]
        if start >= 0 and start + count <= size:
            values = values[(slice(None),) * axis + (slice(start, start + count),)]
        else:
            values = values.take(reflected_positions(start, count, size), axis=axis)
    return values
