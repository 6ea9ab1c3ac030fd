"""Computes the signed distance to the boundary of instances, which also separates touching instances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import find_objects

from volumen.derived.arrays.fields import check_spacing, nearest_squared
from volumen.derived.distance_window import (
    Bounds,
    Region,
    certain_voxels,
    check_masks,
    distance_window,
    signed_and_valid,
    signed_bounds,
    surroundings,
    three_axes,
    unknown_voxels,
)
from volumen.derived.kernels.distance import differing_across, differing_in_row

_UNKNOWN = -1


def instance_distance(
    labels: np.ndarray,
    *,
    spacing: Sequence[float] | None = None,
    reach: float | None = None,
    known: np.ndarray | None = None,
    in_volume: np.ndarray | None = None,
    region: Region | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the signed Euclidean distance to the nearest voxel of another instance or the background.

    It generalises `fields.signed_distance` from two classes to any number: where
    instances touch it is negative on both sides of the face and rises to half a voxel's spacing below 0.
    Axis after axis, a voxel of another instance is at distance 0, and one of the same instance stands for its own line.
    This is exact: if the path to the nearest other voxel left the instance earlier, it would end there.

    Args:
        labels: integer, 2 or 3 axes; 0 and below is background.
        spacing, reach, known, in_volume, region: see `fields.signed_distance`.

    Returns:
        distance float32, negative within instances; valid bool, as in `fields.signed_distance`.

    Raises:
        ValueError: shapes or spacing do not match.
    """
    check_masks(labels.shape, known=known, in_volume=in_volume)
    window = distance_window(labels.shape, check_spacing(labels.ndim, spacing), reach, region)
    numbers = _numbers(labels[window.around])
    known, in_volume = (None if mask is None else mask[window.around] for mask in (known, in_volume))
    unknown = unknown_voxels(known, in_volume)
    nearest_unknown = None
    if unknown is not None:
        numbers[unknown] = _UNKNOWN
        nearest_unknown = _squared(unknown.astype(np.int32), window.costs, window.part)
    if in_volume is None:
        squared = _squared(numbers, window.costs, window.part)
    else:
        squared = _squared_inside(numbers, in_volume, window.costs, window.part)
    squared[numbers[window.part] > 0] *= -1
    return signed_and_valid(squared, window, known, in_volume, nearest_unknown)


def instance_bounds(
    labels: np.ndarray,
    *,
    spacing: Sequence[float] | None = None,
    reach: float | None = None,
    known: np.ndarray | None = None,
    in_volume: np.ndarray | None = None,
    region: Region | None = None,
) -> Bounds:
    """Return bounds of `instance_distance`, whatever the unknown voxels are: see `fields.distance_bounds`.

    Where an unknown voxel is nearer than every known one of another number, the upper bound of an instance is the
    distance to the nearest voxel known to be background; a known instance that is nearer is not searched for.

    Args:
        labels: integer, 2 or 3 axes; 0 and below is background.
        spacing, reach, known, in_volume, region: see `fields.signed_distance`.

    Raises:
        ValueError: shapes or spacing do not match.
    """
    check_masks(labels.shape, known=known, in_volume=in_volume)
    window = distance_window(labels.shape, check_spacing(labels.ndim, spacing), reach, region)
    numbers = _numbers(labels[window.around])
    known, in_volume = (None if mask is None else mask[window.around] for mask in (known, in_volume))
    unknown = unknown_voxels(known, in_volume)
    certain = certain_voxels(numbers.shape, known, in_volume)
    foreground = numbers > 0
    here = foreground[window.part]
    if unknown is not None:
        numbers[unknown] = _UNKNOWN
    if in_volume is None:
        near = _squared(numbers, window.costs, window.part)
    else:
        near = _squared_inside(numbers, in_volume, window.costs, window.part)
    if unknown is None:
        return signed_bounds(near, here, window, certain[window.part], None)
    nearest_unknown = _squared(unknown.astype(np.int32), window.costs, window.part)
    # Of touching instances the exact distance knows; else the other class, which bounds it too, costs far less.
    to_foreground, to_background = (
        nearest_squared(side & certain, window.costs, window.part) for side in (foreground, ~foreground)
    )
    known_here = (near < nearest_unknown) | (near >= window.limit)
    far = np.where(known_here, near, np.where(here, to_background, to_foreground))
    return signed_bounds(far, here, window, certain[window.part], nearest_unknown)


def _numbers(labels: np.ndarray) -> np.ndarray:
    """Return the labels as a new int32 array; values too large for int32 are renumbered; 0 for background."""
    if labels.size and labels.max() > np.iinfo(np.int32).max:
        values, compact = np.unique(labels, return_inverse=True)
        first = int(np.searchsorted(values, 1))
        return np.maximum(compact.reshape(labels.shape) - first + 1, 0).astype(np.int32)
    return np.maximum(labels, 0).astype(np.int32)


def _squared(numbers: np.ndarray, costs: Sequence[np.ndarray], part: Region) -> np.ndarray:
    """Return the squared distance from a voxel to the nearest one with another number."""
    volume = np.ascontiguousarray(numbers).reshape(three_axes(numbers.shape))
    squared = differing_in_row(volume, costs[-1], part[-1].start, part[-1].stop)
    volume = np.ascontiguousarray(volume[:, :, part[-1]])
    squared = differing_across(squared, volume, costs[-2], part[-2].start, part[-2].stop, 1)
    if numbers.ndim == 3:
        volume = np.ascontiguousarray(volume[:, part[-2]])
        squared = differing_across(squared, volume, costs[0], part[0].start, part[0].stop, 0)
    return squared.reshape([piece.stop - piece.start for piece in part])


def _squared_inside(
    numbers: np.ndarray, in_volume: np.ndarray, costs: Sequence[np.ndarray], part: Region
) -> np.ndarray:
    """Compute `_squared` where voxels outside the volume have no number, for one instance after the other.

    Only a patch that was rotated at the volume's border needs it. No line may pass through voxels outside,
    which have no class of their own.
    """
    radii = [len(cost) - 1 for cost in costs]
    _, compact = np.unique(numbers, return_inverse=True)
    compact = compact.reshape(numbers.shape) + 1
    compact[~in_volume] = 0
    whole = np.zeros(numbers.shape, np.float32)
    for number, box in enumerate(find_objects(compact), start=1):
        if box is None:
            continue
        around, inner = surroundings(numbers.shape, box, radii)
        others = (in_volume[around] & (compact[around] != number)).astype(np.int32)
        mask = compact[box] == number
        whole[box][mask] = _squared(others, costs, inner)[mask]
    whole[numbers == _UNKNOWN] = 0
    return np.ascontiguousarray(whole[part])
