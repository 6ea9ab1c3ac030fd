"""Distances within a reach that are the same wherever an array was cropped, and what lies at their end."""

from __future__ import annotations

import numpy as np

from volumen.derived.kernels.distance import (
    differing_across,
    differing_in_row,
    nearest_across,
    nearest_in_row,
    nearest_offsets,
)
from volumen.metrics.geometry.scale import Scale, ball
from volumen.utils.jit import compiled


def squared_to_other(numbers: np.ndarray, scale: Scale, length: float) -> np.ndarray:
    """Return the squared distance from each voxel's centre to the nearest one of another number.

    Args:
        numbers: int32 (Z, Y, X), none negative.
        scale: voxel sizes.
        length: distances up to it are exact, larger ones are any number above its square.

    Returns:
        float32 (Z, Y, X).
    """
    costs = scale.costs(length)
    squared = differing_in_row(numbers, costs[2], 0, numbers.shape[2])
    squared = differing_across(squared, numbers, costs[1], 0, numbers.shape[1], 1)
    return np.asarray(differing_across(squared, numbers, costs[0], 0, numbers.shape[0], 0))


def squared_to(feature: np.ndarray, scale: Scale, length: float) -> np.ndarray:
    """Return the squared distance from each voxel's centre to the nearest True one, see `squared_to_other`."""
    costs = scale.costs(length)
    squared = nearest_in_row(np.ascontiguousarray(feature), costs[2], 0, feature.shape[2])
    squared = nearest_across(squared, costs[1], 0, feature.shape[1], 1)
    return np.asarray(nearest_across(squared, costs[0], 0, feature.shape[0], 0))


def filled(numbers: np.ndarray, known: np.ndarray, scale: Scale) -> np.ndarray:
    """Return numbers in which unknown voxels have that of the nearest known one within the largest ball's radius.

    So an unknown voxel neither ends a structure nor begins one: a sheet that the mask cuts goes on, straight out of
    the labelled part.

    Args:
        numbers: int32 (Z, Y, X).
        known: bool, same shape.
        scale: voxel sizes.
    """
    if known.all() or not known.any():
        return numbers
    steps = nearest_offsets(np.ascontiguousarray(known), *scale.costs(scale.radius))
    where = np.nonzero(~known)
    places = [index + steps[axis][where] for axis, index in enumerate(where)]
    out = numbers.copy()
    out[where] = np.where(known[tuple(places)], numbers[tuple(places)], 0)
    return out


@compiled
def _first_hit(voxels, squared, feature, offsets, norms, limit):
    """Return the place of the nearest True voxel of each voxel, int64 (n, 3); -1 where it is beyond the limit."""
    out = np.full((len(voxels), 3), -1, np.int64)
    nz, ny, nx = feature.shape
    for i in range(len(voxels)):
        z, y, x = voxels[i, 0], voxels[i, 1], voxels[i, 2]
        least = squared[z, y, x]
        if least > limit:
            continue
        for j in range(np.searchsorted(norms, least), len(offsets)):
            a, b, c = z + offsets[j, 0], y + offsets[j, 1], x + offsets[j, 2]
            if 0 <= a < nz and 0 <= b < ny and 0 <= c < nx and feature[a, b, c]:
                out[i, 0], out[i, 1], out[i, 2] = a, b, c
                break
    return out


def nearest_places(voxels: np.ndarray, feature: np.ndarray, scale: Scale, length: float) -> np.ndarray:
    """Return where the nearest True voxel of each voxel lies, of equally near ones the smallest z, then y, then x.

    Args:
        voxels: int64 (n, 3).
        feature: bool (Z, Y, X).
        scale: voxel sizes.
        length: as far as is looked.

    Returns:
        int64 (n, 3); -1 where none is that near.
    """
    offsets, norms = ball(scale.costs(length), length)
    squared = squared_to(feature, scale, length)
    return np.asarray(_first_hit(voxels, squared, feature, offsets, norms, norms[-1]))
