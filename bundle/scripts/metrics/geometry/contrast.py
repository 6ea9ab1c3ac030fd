"""How clearly a surface shows in the image."""

from __future__ import annotations

import numpy as np

from volumen.metrics.geometry.scale import SHELL, Scale, ball
from volumen.utils.jit import compiled

LEAST = 5
"""Voxels that are needed on each side of a surface."""
MOST = 20.0
"""Contrasts beyond this, as of images without noise, count as this."""


@compiled
def _contrasts(image, numbers, known, places, offsets, least, most):
    out = np.full(len(places), np.nan)
    nz, ny, nx = image.shape
    for i in range(len(places)):
        z, y, x = places[i, 0], places[i, 1], places[i, 2]
        count = np.zeros(2)
        total = np.zeros(2)
        square = np.zeros(2)
        base = float(image[z, y, x])
        for j in range(len(offsets)):
            a, b, c = z + offsets[j, 0], y + offsets[j, 1], x + offsets[j, 2]
            if not (0 <= a < nz and 0 <= b < ny and 0 <= c < nx) or not known[a, b, c]:
                continue
            side = 0 if numbers[a, b, c] == numbers[z, y, x] else 1
            value = float(image[a, b, c]) - base
            count[side] += 1
            total[side] += value
            square[side] += value * value
        if min(count[0], count[1]) < least:
            continue
        mean = total / count
        spread = np.sqrt(
            max(0.0, (square[0] / count[0] - mean[0] ** 2 + square[1] / count[1] - mean[1] ** 2) / 2)
        )
        difference = mean[0] - mean[1]
        if abs(difference) >= most * spread:
            out[i] = most if difference > 0 else -most if difference < 0 else 0.0
        else:
            out[i] = difference / spread
    return out


def surface_contrast(
    image: np.ndarray, numbers: np.ndarray, known: np.ndarray, places: np.ndarray, scale: Scale
) -> np.ndarray:
    """Return the image's contrast at surface voxels: d' = (mean inside - mean outside) / pooled standard deviation.

    Inside and outside are the known voxels within a ball around the surface voxel that belong to its object, and those
    that do not; the pooled deviation is the root of the mean of both variances (Green and Swets 1966).

    Args:
        image: (Z, Y, X), finite where it counts.
        numbers: int32, same shape, objects; 0 outside.
        known: bool, same shape.
        places: int64 (n, 3), surface voxels.
        scale: voxel sizes.

    Returns:
        float64 (n,), without unit, between -20 and 20; NaN where a side has fewer than 5 voxels.
    """
    length = SHELL * scale.finest
    offsets, _ = ball(scale.costs(length), length)
    grey = np.ascontiguousarray(image, dtype=np.float32)
    return np.asarray(_contrasts(grey, numbers, known & np.isfinite(grey), places, offsets, LEAST, MOST))
