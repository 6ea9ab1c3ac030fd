"""How far derived targets depend on voxels around: reach of distances and radius of filters, in voxels per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEFAULT_REACH = 16.0
"""Distances are cut at this many times the smallest spacing unless a task sets a reach."""
TRUNCATE = 4.0
"""A Gaussian filter extends to this many standard deviations, as SciPy's does."""


def in_voxels(spacing: Sequence[float]) -> tuple[float, ...]:
    """Return the voxel size per axis in units of the smallest one."""
    return tuple(float(size) / min(spacing) for size in spacing)


def distance_halo(reach: float | None, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return how many voxels away, per axis, the nearest voxel can lie if its distance is below `reach`."""
    cut = resolve_reach(reach, spacing)
    return tuple(max(1, math.ceil(cut / size + 0.5) - 1) for size in spacing)


def resolve_reach(reach: float | None, spacing: Sequence[float]) -> float:
    """Return the distance at which values are cut, in the unit of the spacing."""
    return DEFAULT_REACH * min(spacing) if reach is None else float(reach)


def gaussian_radius(sigma: float, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the filter radius in voxels per axis for `sigma`, which is in voxels of the smallest
    spacing."""
    finest = min(spacing)
    return tuple(int(TRUNCATE * sigma * finest / size + 0.5) for size in spacing)


def gradient_radius(sigma: float, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the radius of a central difference of the Gaussian-smoothed field, in voxels per axis."""
    return tuple(radius + 1 for radius in gaussian_radius(sigma, spacing))


def add_radii(*radii: Sequence[int]) -> tuple[int, ...]:
    """Return the sum per axis, which is the radius of filters applied one after the other."""
    return tuple(sum(axis) for axis in zip(*radii))
