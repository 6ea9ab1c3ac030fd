"""Structure tensors and the axes that they define."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scripts.transforms import eigen_kernels
from scripts.transforms.fields import smooth_products

PLAIN_TRACE = 1e-3
"""A tensor of a smaller trace says "nothing here": there is no surface to speak of within the filters."""
MIN_GAP = 1e-3
"""Relative gap between the two smallest eigenvalues below which the axis of the smallest is undefined."""


def structure_tensor(
    slope: np.ndarray, sigma: float, spacing: Sequence[float], in_volume: np.ndarray | None = None
) -> np.ndarray:
    """Gaussian-smoothed outer product of a gradient: J = G_sigma * (g g^T).

    Bigun and Granlund, "Optimal orientation detection of linear symmetry", 1987.

    Args:
        slope: float32 (ndim, *spatial), gradient in the order of the spatial axes; 0 outside the volume.
        sigma: width of the smoothing, in voxels of the smallest spacing.
        spacing: voxel size per axis.
        in_volume: bool (*spatial); default everywhere inside.

    Returns:
        float32, 2D (3, *spatial) in the order (yy, yx, xx), 3D (6, *spatial) (zz, zy, zx, yy, yx, xx).
    """
    return smooth_products(slope, sigma, spacing, in_volume)


def tensor_trace(tensor: np.ndarray) -> np.ndarray:
    """Return the trace (*spatial) of tensors in the channel order of `structure_tensor`."""
    if len(tensor) == 3:
        return tensor[0] + tensor[2]
    return tensor[0] + tensor[3] + tensor[5]


def smallest_axis(
    tensor: np.ndarray, valid: np.ndarray, min_gap: float = MIN_GAP
) -> tuple[np.ndarray, np.ndarray]:
    """Unit eigenvector of the smallest eigenvalue: the direction in which the structure changes least.

    The axis has no sign; the one with a positive first non-zero component in the order (z, y, x) is given.

    Args:
        tensor: float32 (3 or 6, *spatial), channel order of `structure_tensor`.
        valid: bool (*spatial); nothing is computed elsewhere.
        min_gap: where the two smallest eigenvalues differ by less than this part of the largest (a flat sheet
            in 3D), every direction between them serves as well: invalid.

    Returns:
        axes float32 (ndim, *spatial), channel order (x, y[, z]), 0 where invalid; valid bool (*spatial).
    """
    shape = tensor.shape[1:]
    good = np.array(valid, dtype=bool).reshape(-1)
    flat = np.ascontiguousarray(tensor.reshape(len(tensor), -1))
    solve = eigen_kernels.smallest_axis_2d if len(tensor) == 3 else eigen_kernels.smallest_axis_3d
    axes = np.empty((2 if len(tensor) == 3 else 3, flat.shape[1]), np.float32)
    solve(flat, good, min_gap, axes)
    return axes.reshape(-1, *shape), good.reshape(shape)
