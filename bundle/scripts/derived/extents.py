"""How far derived targets look around a voxel: reach of distances and radius of filters, in voxels per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEFAULT_REACH = 16.0
"""Distances are cut at this many times the smallest spacing unless a task says otherwise."""
TRUNCATE = 4.0
"""A Gaussian filter looks this many standard deviations far, as SciPy's does."""


def in_voxels(spacing: Sequence[float]) -> tuple[float, ...]:
    """Return a voxel size per axis in units of the smallest one."""
    return tuple(float(size) / min(spacing) for size in spacing)


def distance_halo(reach: float | None, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return how many voxels away, per axis, the nearest voxel of a distance below `reach` can lie."""
    cut = resolve_reach(reach, spacing)
    return tuple(max(1, math.ceil(cut / size + 0.5) - 1) for size in spacing)


def resolve_reach(reach: float | None, spacing: Sequence[float]) -> float:
    """Return the distance at which values are cut, in the unit of the spacing."""
    return DEFAULT_REACH * min(spacing) if reach is None else float(reach)


def gaussian_radius(sigma: float, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the filter radius in voxels per axis for `sigma`, which counts in voxels of the smallest
    spacing."""
    finest = min(spacing)
    return tuple(int(TRUNCATE * sigma * finest / size + 0.5) for size in spacing)


def gradient_radius(sigma: float, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return how far a central difference of the Gaussian-smoothed field looks, in voxels per axis."""
    return tuple(radius + 1 for radius in gaussian_radius(sigma, spacing))


def add_radii(*radii: Sequence[int]) -> tuple[int, ...]:
    """Return the per-axis sum: filters applied one after the other."""
    return tuple(sum(axis) for axis in zip(*radii))
