"""Distances between the surfaces of two masks, as exact counts that add up over blocks, and scores of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


def surface_voxels(
    mask: np.ndarray, known: np.ndarray | None = None, border: bool = False, axes: Sequence[int] | None = None
) -> np.ndarray:
    """Return the voxels of a mask with a face neighbour outside it.

    Args:
        mask: bool, spatial.
        known: bool, same shape; an unknown neighbour is not outside. None: all are known.
        border: whether beyond the array's border lies outside, as MONAI takes it. False: a structure that the border
            cuts has no surface there.
        axes: axes along which neighbours lie; None for all.

    Returns:
        bool, same shape; within `known`.
    """
    outside = ~mask if known is None else ~mask & known
    surface = np.zeros_like(mask)
    for axis in range(mask.ndim) if axes is None else axes:
        low = [slice(None)] * mask.ndim
        high = list(low)
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        surface[tuple(low)] |= outside[tuple(high)]
        surface[tuple(high)] |= outside[tuple(low)]
        if border:
            ends = np.moveaxis(surface, axis, 0)
            ends[0] = ends[-1] = True
    surface &= mask
    return surface if known is None else surface & known


@dataclass(frozen=True)
class DistanceCounts:
    """How many surface voxels lie at each distance; exact, as no distance is rounded to a bin.

    Args:
        squared: float64 (n,), squared distances, ascending, each once.
        counts: int64 (n,), surface voxels at each.
    """

    squared: np.ndarray = field(default_factory=lambda: np.zeros(0))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, squared: np.ndarray, counts: np.ndarray | None = None) -> DistanceCounts:
        """Count squared distances in any order, each as often as `counts` says (None: once)."""
        values, group = np.unique(squared, return_inverse=True)
        total = np.zeros(len(values), np.int64)
        np.add.at(total, group.reshape(-1), 1 if counts is None else counts)
        return cls(values, total)

    def __add__(self, other: DistanceCounts) -> DistanceCounts:
        return self.of(
            np.concatenate([self.squared, other.squared]), np.concatenate([self.counts, other.counts])
        )

    @property
    def total(self) -> int:
        """Surface voxels."""
        return int(self.counts.sum())

    @property
    def length(self) -> float:
        """Sum of all distances."""
        return float((np.sqrt(self.squared) * self.counts).sum())

    def within(self, tolerance: float) -> int:
        """Return the surface voxels up to a distance; a part in 10^9 is rounding."""
        limit = (tolerance * (1 + 1e-9)) ** 2
        return int(self.counts[: np.searchsorted(self.squared, limit, side="right")].sum())

    def percentile(self, percent: float) -> float:
        """Return a percentile of the distances, between two of them by linear interpolation, as NumPy does."""
        place = percent / 100 * (self.total - 1)
        ends = np.cumsum(self.counts)
        low, high = (
            math.sqrt(self.squared[np.searchsorted(ends, index, side="right")])
            for index in (math.floor(place), math.ceil(place))
        )
        return low + (high - low) * (place - math.floor(place))


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances from each surface voxel of one mask to the nearest of the other, voxel centre to voxel centre.

    Lengths are in units of the spacing. Where one mask has no surface, every distance to it is the diagonal of the
    volume: a finite penalty that a mean can hold.

    Args:
        to_truth: of the surface voxels of the prediction.
        to_pred: of the surface voxels of the truth.
        diagonal: length of the volume's diagonal, the most that a distance can be.
    """

    to_truth: DistanceCounts
    to_pred: DistanceCounts
    diagonal: float

    def __add__(self, other: SurfaceDistances) -> SurfaceDistances:
        return SurfaceDistances(self.to_truth + other.to_truth, self.to_pred + other.to_pred, self.diagonal)


def surface_dice(distances: SurfaceDistances, tolerance: float) -> float:
    """Return the share of both surfaces that lies within the tolerance of the other; NaN without any surface.

    The normalised surface distance of Nikolov et al. 2018, each surface voxel with the same area, as MONAI's
    SurfaceDiceMetric counts it.
    """
    both = (distances.to_truth, distances.to_pred)
    total = sum(counts.total for counts in both)
    return sum(counts.within(tolerance) for counts in both) / total if total else math.nan


def hausdorff(distances: SurfaceDistances, percent: float = 95.0) -> float:
    """Return the larger of the two directed Hausdorff distances, each as a percentile.

    The volume's diagonal where one mask has no surface; NaN where both have none. MONAI's HausdorffDistanceMetric
    takes the same percentiles and directions.
    """
    both = (distances.to_truth, distances.to_pred)
    if not any(counts.total for counts in both):
        return math.nan
    if not all(counts.total for counts in both):
        return distances.diagonal
    return max(counts.percentile(percent) for counts in both)


def mean_distance(*counts: DistanceCounts) -> float:
    """Return the mean over the surface voxels of one direction or of both together; NaN without any.

    Of both together it is the average symmetric surface distance (Heimann et al. 2009), as MONAI's
    SurfaceDistanceMetric with `symmetric=True` counts it.
    """
    total = sum(part.total for part in counts)
    return sum(part.length for part in counts) / total if total else math.nan
