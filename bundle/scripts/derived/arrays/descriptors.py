"""Computes local shape descriptors of instances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import correlate1d, find_objects

from volumen.derived.extents import gaussian_radius


def local_shape_descriptors(labels: np.ndarray, sigma: float, spacing: Sequence[float]) -> np.ndarray:
    """Return statistics of the part of a voxel's instance within a Gaussian window around the voxel.

    With m the mask of the voxel's instance, w the normalised Gaussian and k the offset in units of sigma:
    size S = sum w m, mean offset mu = sum w m k / S, covariance C = sum w m k k^T / S - mu mu^T (Sheridan et
    al., "Local shape descriptors for neuron segmentation", Nature Methods 2022; there offsets and
    correlations are also shifted into [0, 1]). Outside the arrays there is no instance.

    Args:
        labels: integer (*spatial), 2 or 3 axes, instance numbers.
        sigma: width of the window, in voxels of the smallest spacing; it ends at 4 sigma.
        spacing: voxel size per axis.

    Returns:
        float32 (6 or 10, *spatial), 0 in the background: mu (x, y[, z]); C (yy, yx, xx) or (zz, zy, zx, yy,
        yx, xx); S.
    """
    ndim = labels.ndim
    pairs = [(i, j) for i in range(ndim) for j in range(i, ndim)]
    radii = gaussian_radius(sigma, spacing)
    windows = [_moment_kernels(sigma * min(spacing) / step, radius) for step, radius in zip(spacing, radii)]
    out = np.zeros((ndim + len(pairs) + 1, *labels.shape), np.float32)
    numbers, compact = np.unique(labels, return_inverse=True)
    boxes = find_objects(compact.reshape(labels.shape) + 1)
    for number, box in zip(numbers, boxes):
        if number <= 0 or box is None:
            continue
        # Only the voxel's own instance counts, and it lies within the box: nothing around the box is needed.
        mask = labels[box] == number
        moments = _moments(mask.astype(np.float32), windows)
        size = np.maximum(moments[(0,) * ndim], 1e-12)
        unit = np.eye(ndim, dtype=int)
        mean = [moments[tuple(unit[axis])] / size for axis in range(ndim)]
        spread = [moments[tuple(unit[i] + unit[j])] / size - mean[i] * mean[j] for i, j in pairs]
        for channel, value in enumerate([*mean[::-1], *spread, size]):
            out[(channel, *box)][mask] = value[mask]
    return out


def _moment_kernels(sigma: float, radius: int) -> list[np.ndarray]:
    """Return the Gaussian times k^0, k^1 and k^2, k in units of sigma."""
    steps = np.arange(-radius, radius + 1)
    scaled = steps / sigma if sigma > 0 else steps * 0.0
    weights = np.exp(-0.5 * scaled**2)
    weights /= weights.sum()
    return [weights * scaled**power for power in range(3)]


def _moments(mask: np.ndarray, windows: Sequence[Sequence[np.ndarray]]) -> dict[tuple[int, ...], np.ndarray]:
    """Return every moment up to order 2, by powers per axis; common intermediate results are computed once."""
    parts: dict[tuple[int, ...], np.ndarray] = {(): mask}
    for axis, kernels in enumerate(windows):
        parts = {
            (*powers, power): correlate1d(array, kernels[power], axis=axis, mode="constant")
            for powers, array in parts.items()
            for power in range(3 - sum(powers))
        }
    return parts
