"""Finds where labels are known in a plane alone, such as a single slice, and the direction across it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.derived.arrays.fields import erode
from volumen.derived.arrays.tensors import smallest_axis
from volumen.derived.distance_window import Region
from volumen.derived.kernels import completion as kernels

SIDE = 3
"""The scatter of known voxels is that within a box of as many voxels to every side."""
NEAR = 2
"""More than a plane is known if a voxel within a box of as many voxels has known face neighbours on all sides."""
BLOCK = 4
"""The direction is computed once for a block of as many voxels along every axis."""
LEAST_GAP = 0.4
"""Least difference of the two smallest eigenvalues of the scatter, over the largest, in a plane."""


def free_direction(
    known: np.ndarray, spacing: Sequence[float], in_volume: np.ndarray | None, region: Region
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return where only a plane is known, and the direction across it.

    A known voxel is flat if no voxel within a box of 2 has known face neighbours on all sides (beyond the border of the
    volume counts as known). The direction is the eigenvector of the smallest eigenvalue of the scatter of the known
    voxels around its block. So a slice is found also after a rotation; slabs of three and more slices are not flat.

    Args:
        known: bool (Z, Y, X).
        spacing: voxel size per axis.
        in_volume: bool, or None for everywhere.
        region: the part to compute.

    Returns:
        direction float32 (3, *region), order (x, y, z), 0 where the voxel is not flat or the known voxels around it
        form no plane; flat bool (*region), or None for nowhere.
    """
    shape = [part.stop - part.start for part in region]
    inner = _interior(known, in_volume)
    flat = known[region] & erode(~inner, (NEAR,) * known.ndim, None, region)
    if not flat.any():
        return np.zeros((known.ndim, *shape), np.float32), None
    places, blocks = zip(*(lattice(part) for part in region))
    scatter = np.empty((6, *map(len, places)), np.float32)
    kernels.scatter_of_known(np.ascontiguousarray(known), *places, scatter)
    direction, _ = smallest_axis(scatter, np.ones(scatter.shape[1:], bool), LEAST_GAP)
    # Of a plane that is perpendicular to n in voxels, n over the voxel size is perpendicular in space.
    direction /= np.array(spacing[::-1], np.float32).reshape(3, 1, 1, 1)
    direction /= np.maximum(np.sqrt((direction**2).sum(axis=0)), np.float32(1e-6))
    rows, columns, lines = np.ix_(*blocks)
    return direction[:, rows, columns, lines] * flat, flat


def lattice(part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle of each block of voxels in a part of an axis, and the block of every voxel of the part."""
    starts = np.arange(part.start, part.stop, BLOCK)
    return np.minimum(starts + BLOCK // 2, part.stop - 1), (
        np.arange(part.start, part.stop) - part.start
    ) // BLOCK


def _interior(known: np.ndarray, in_volume: np.ndarray | None) -> np.ndarray:
    """Return the known voxels all of whose face neighbours are known or outside the volume."""
    open_side = ~known if in_volume is None else ~known & in_volume
    inner = known.copy()
    for axis in range(known.ndim):
        mine, other = np.moveaxis(inner, axis, 0), np.moveaxis(open_side, axis, 0)
        mine[1:] &= ~other[:-1]
        mine[:-1] &= ~other[1:]
    return inner
