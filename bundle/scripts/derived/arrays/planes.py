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

LEAST_PART = 0.3
"""A vector of which a smaller part lies within the plane that is known has no target there."""


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
    found = np.zeros((known.ndim, *shape), np.float32)
    z, y, x = np.nonzero(flat)
    found[:, z, y, x] = direction[:, blocks[0][z], blocks[1][y], blocks[2][x]]
    return found, flat


def within_planes(
    values: np.ndarray, confidence: np.ndarray, free: np.ndarray, flat: np.ndarray, plane_confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where only a plane is known, replace vectors or tensors by their part within it.

    Of a vector this is the unit vector of the part across `free`; its confidence is `plane_confidence` times the length
    of that part, 0 below `LEAST_PART`. Of a tensor A it is P A P, P = 1 - f f^T. Where the voxels around form no plane,
    `free` is 0 and the confidence 0.

    Args:
        values: float32 (3, Z, Y, X) vectors (x, y, z), or (6, Z, Y, X) tensors (zz, zy, zx, yy, yx, xx).
        confidence: float32 (Z, Y, X), of the values.
        free: float32 (3, Z, Y, X), order (x, y, z), the direction across the plane.
        flat: bool (Z, Y, X), where only a plane is known.
        plane_confidence: of the part within the plane.

    Returns:
        new arrays in place of values, confidence and free; the last one is 0 where not `flat`.
    """
    count = flat.size
    values, confidence = values.copy(), np.array(confidence, np.float32)
    trust, least = np.float32(plane_confidence), np.float32(LEAST_PART)
    directions = np.ascontiguousarray(free).reshape(3, count)
    places = np.flatnonzero(flat)
    across = kernels.vectors_across if len(values) == 3 else kernels.tensors_across
    across(values.reshape(-1, count), confidence.reshape(-1), directions, places, trust, least)
    return values, confidence, free * flat


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
