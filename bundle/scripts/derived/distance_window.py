"""Determines the input of a distance with limited reach, and converts squared distances to signed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from volumen.derived.extents import resolve_reach
from volumen.derived.kernels import distance as distance_kernels

Region = tuple[slice, ...]


class DistanceWindow(NamedTuple):
    """The part of an array on which the distances in a region depend.

    Attributes:
        cut: maximum distance, in the unit of the spacing.
        half: half the smallest spacing, the distance from a voxel's centre to its nearest face.
        costs: per axis, float32 squared distances of 0, 1, ... steps to a voxel's inner box, up to the reach.
        around: the region and all voxels within reach of it, as a part of the array.
        part: the region as a part of `around`.
    """

    cut: float
    half: float
    costs: list[np.ndarray]
    around: Region
    part: Region

    @property
    def limit(self) -> np.float32:
        """The squared distance at and above which distances are cut."""
        return np.float32((self.cut + self.half) ** 2)


class Bounds(NamedTuple):
    """What is known of a signed distance, whatever the unknown voxels are: arrays, or tensors with a batch axis.

    Attributes:
        lower, upper: float32 (*part), equal where the distance is known, 0 where the class is unknown.
        known: bool (*part), where the class is known.
        clearance: float32 (*part), distance to the nearest unknown voxel, cut at the reach; below 0 at unknown ones.
        certain: bool (*part): no unknown voxel is as near as the nearest one of another class, or as the reach.
    """

    lower: Any
    upper: Any
    known: Any
    clearance: Any
    certain: Any


def distance_window(
    shape: Sequence[int], spacing: Sequence[float], reach: float | None, region: Region | None
) -> DistanceWindow:
    """Return the window on which distances up to `reach` in a region (None: everywhere) depend."""
    cut = resolve_reach(reach, spacing)
    costs = [_step_costs(size, min(spacing), cut) for size in spacing]
    around, part = surroundings(shape, region, [len(cost) - 1 for cost in costs])
    return DistanceWindow(cut, min(spacing) / 2, costs, around, part)


def signed_and_valid(
    squared: np.ndarray,
    window: DistanceWindow,
    known: np.ndarray | None,
    in_volume: np.ndarray | None,
    nearest_unknown: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Convert signed squared distances to distances, in place, and determine which are valid.

    Args:
        squared: float32 (*part), distance to the nearest voxel of another class; negative in the foreground.
        window: the window of the distances.
        known, in_volume: bool (*around), None for everywhere.
        nearest_unknown: float32 (*part), squared distance to the nearest unknown voxel; None if all are known.

    Returns:
        distance float32 (*part), 0 where invalid; valid bool (*part): see `fields.signed_distance`.
    """
    valid = np.ones(squared.shape, bool)
    for mask in (known, in_volume):
        if mask is not None:
            valid &= mask[window.part]
    if nearest_unknown is not None:
        nearest = np.abs(squared)
        valid &= (nearest < nearest_unknown) | (nearest >= window.limit)
    distance_kernels.signed_root(squared.reshape(-1), np.float32(window.half), np.float32(window.cut))
    if not valid.all():
        squared[~valid] = 0
    return squared, valid


def signed_bounds(
    nearest_other: np.ndarray,
    foreground: np.ndarray,
    window: DistanceWindow,
    known: np.ndarray,
    nearest_unknown: np.ndarray | None,
) -> Bounds:
    """Convert squared distances to bounds of the signed distance.

    The nearest voxel of another class is no farther than the nearest one that is known, and no nearer than the
    nearest unknown voxel where that is nearer. Both ends are sums of the same numbers as the distance itself, so the
    bounds hold exactly, also in float32.

    Args:
        nearest_other: float32 (*part), squared distance to the nearest voxel known to be of another class.
        foreground: bool (*part).
        window: the window of the distances.
        known: bool (*part), where the class is known.
        nearest_unknown: float32 (*part), squared distance to the nearest unknown voxel; None if all are known.
    """
    upper, sure = np.ascontiguousarray(nearest_other), np.ascontiguousarray(known)
    if nearest_unknown is None:
        clearance = np.full(upper.shape, np.float32(1e30))
    else:
        clearance = np.ascontiguousarray(nearest_unknown)
    lower, certain = np.empty_like(upper), np.empty_like(sure)
    flat = (x.reshape(-1) for x in (clearance, upper, np.ascontiguousarray(foreground), sure))
    distance_kernels.bounds_of_roots(
        *flat, np.float32(window.half), np.float32(window.cut), lower.reshape(-1), certain.reshape(-1)
    )
    return Bounds(lower, upper, sure, clearance, certain)


def unknown_voxels(known: np.ndarray | None, in_volume: np.ndarray | None) -> np.ndarray | None:
    """Return where no label is known inside the volume; None if there is no such voxel."""
    if known is None or known.all():
        return None
    unknown = ~known if in_volume is None else in_volume & ~known
    return unknown if unknown.any() else None


def certain_voxels(
    shape: Sequence[int], known: np.ndarray | None, in_volume: np.ndarray | None
) -> np.ndarray:
    """Return where a label is known inside the volume: bool (*shape)."""
    if known is None:
        return np.ones(shape, bool) if in_volume is None else in_volume
    return known if in_volume is None else known & in_volume


def check_masks(shape: Sequence[int], **masks: Any) -> None:
    """Compare the shapes of masks (arrays or tensors, by name) with the expected shape.

    Raises:
        ValueError: a shape differs.
    """
    for name, mask in masks.items():
        if mask is not None and tuple(mask.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(mask.shape)}, the labels ask for {tuple(shape)}")


def surroundings(shape: Sequence[int], region: Region | None, radii: Sequence[int]) -> tuple[Region, Region]:
    """Return the region enlarged by `radii`, clipped to the array, and the region as a part of that."""
    if region is None:
        everything = tuple(slice(0, size) for size in shape)
        return everything, everything
    around = tuple(
        slice(max(part.start - radius, 0), min(part.stop + radius, size))
        for part, radius, size in zip(region, radii, shape)
    )
    inner = tuple(
        slice(part.start - outer.start, part.stop - outer.start) for part, outer in zip(region, around)
    )
    return around, inner


def three_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Extend a shape of 2 or 3 axes to three axes."""
    return (1,) * (3 - len(shape)) + tuple(shape)


def _step_costs(size: float, finest: float, reach: float) -> np.ndarray:
    last = max(1, int(np.ceil(reach / size + 0.5)))
    steps = np.arange(last + 1)
    return (np.maximum(steps * size - (size - finest) / 2, 0) ** 2).astype(np.float32)
