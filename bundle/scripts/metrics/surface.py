"""Distances between the surfaces of two binary masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volumen.utils.boxes import bounding_box


def surface_voxels(mask: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the voxels of a mask with a face neighbour outside it.

    Neither the array's border nor an unknown neighbour is an outside: a structure cut there has no surface.

    Args:
        mask: bool, spatial.
        known: bool, same shape; None: all.

    Returns:
        bool, same shape; within `known`.
    """
    outside = ~mask if known is None else ~mask & known
    surface = np.zeros_like(mask)
    for axis in range(mask.ndim):
        low = [slice(None)] * mask.ndim
        high = list(low)
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        surface[tuple(low)] |= outside[tuple(high)]
        surface[tuple(high)] |= outside[tuple(low)]
    surface &= mask
    return surface if known is None else surface & known


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances from each surface voxel of one mask to the nearest of the other, in units of the spacing.

    Attributes:
        to_truth: float32, one per surface voxel of the prediction.
        to_pred: float32, one per surface voxel of the truth.
        diagonal: length of the array's diagonal, the most that a distance can be; it also stands for the
            distance to a mask that is empty.
    """

    to_truth: np.ndarray
    to_pred: np.ndarray
    diagonal: float


def surface_distances(
    pred: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float] | None = None,
    known: np.ndarray | None = None,
    counted: np.ndarray | None = None,
) -> SurfaceDistances:
    """Measure the distances between two surfaces, voxel centre to voxel centre.

    Args:
        pred: bool, spatial.
        truth: bool, same shape.
        spacing: voxel size in spatial order; None is 1.
        known: bool; voxels outside it have no label, and no surface.
        counted: bool; surface voxels outside it are measured to but do not count, as in the halo of a block.

    Returns:
        the distances. Where one surface is empty, those to it are the array's diagonal.
    """
    import edt

    step = tuple(float(s) for s in (spacing or (1.0,) * pred.ndim))
    if len(step) != pred.ndim:
        raise ValueError(f"spacing must have {pred.ndim} entries, got {step}")
    diagonal = math.sqrt(sum((n * s) ** 2 for n, s in zip(pred.shape, step, strict=True)))
    surfaces = [surface_voxels(mask, known) for mask in (pred, truth)]
    box = tuple(slice(*side) for side in bounding_box(surfaces[0] | surfaces[1]))
    of_pred, of_truth = (surface[box] for surface in surfaces)
    wanted = None if counted is None else counted[box]
    found = []
    for here, there in ((of_pred, of_truth), (of_truth, of_pred)):
        picked = here if wanted is None else here & wanted
        if there.any() and picked.any():
            # edt measures to the nearest zero, and takes the border for one only with black_border.
            found.append(edt.edt(~there, anisotropy=step)[picked])
        else:
            found.append(np.full(np.count_nonzero(picked), diagonal, dtype=np.float32))
    return SurfaceDistances(found[0], found[1], diagonal)


def surface_dice_counts(distances: SurfaceDistances, tolerance: float) -> np.ndarray:
    """Return float64 (2,): surface voxels of both masks within the tolerance, and all of them. They add up."""
    near = np.count_nonzero(distances.to_truth <= tolerance) + np.count_nonzero(
        distances.to_pred <= tolerance
    )
    return np.array([near, distances.to_truth.size + distances.to_pred.size], dtype=np.float64)


def surface_dice(counts: np.ndarray) -> float:
    """Return the share of both surfaces that lies within the tolerance; NaN without any surface.

    The normalised surface distance of Nikolov et al. 2018, each surface voxel with the same area, as MONAI's
    SurfaceDiceMetric counts it.
    """
    return float(counts[0] / counts[1]) if counts[1] else math.nan


def hausdorff(distances: SurfaceDistances, percentile: float = 95.0) -> float:
    """Return the larger of the two directed Hausdorff distances, each as a percentile.

    Where one mask is empty and the other not, the array's diagonal: a finite penalty that a mean can hold.
    NaN without any surface. MONAI's HausdorffDistanceMetric takes the same percentiles and directions.
    """
    both = (distances.to_truth, distances.to_pred)
    if not any(d.size for d in both):
        return math.nan
    if not all(d.size for d in both):
        return distances.diagonal
    return float(max(np.percentile(d, percentile) for d in both))
