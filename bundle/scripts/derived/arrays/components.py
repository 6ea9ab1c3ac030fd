"""Computes the direction to the nearest foreground voxel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.derived.arrays.fields import check_spacing
from volumen.derived.distance_window import Region, distance_window, three_axes
from volumen.derived.kernels import distance as distance_kernels


def nearest_component(
    foreground: np.ndarray,
    *,
    spacing: Sequence[float] | None = None,
    reach: float | None = None,
    region: Region | None = None,
) -> np.ndarray:
    """Return unit vectors from every voxel to the centre of the nearest foreground voxel.

    u(p) = (q - p) / |q - p|, q the foreground voxel whose body (see `fields.signed_distance`) is nearest to
    p; of equally near voxels, the first in the order (z, y, x).

    Args:
        foreground: bool, 2 or 3 axes; only voxels that are known to be foreground.
        spacing: voxel size per axis; default 1.
        reach: maximum distance of the search, in the unit of the spacing; default 16 times the smallest spacing.
        region: the part to compute; default all.

    Returns:
        float32 (ndim, *region), channel order (x, y[, z]); 0 in the foreground and where no foreground is within
        reach.
    """
    steps = check_spacing(foreground.ndim, spacing)
    window = distance_window(foreground.shape, steps, reach, region)
    volume = np.ascontiguousarray(foreground[window.around])
    nowhere = np.zeros(1, np.float32)
    padded = [nowhere] * (3 - foreground.ndim) + window.costs
    offsets = distance_kernels.nearest_offsets(volume.reshape(three_axes(volume.shape)), *padded)
    offsets = offsets[3 - foreground.ndim :].reshape(foreground.ndim, *volume.shape)[
        (slice(None), *window.part)
    ]
    vectors = offsets[::-1] * np.array(steps[::-1], np.float32).reshape(-1, *[1] * foreground.ndim)
    norm = np.sqrt(np.einsum("c...,c...->...", vectors, vectors))
    return np.divide(vectors, norm, out=np.zeros_like(vectors), where=norm > 0)
