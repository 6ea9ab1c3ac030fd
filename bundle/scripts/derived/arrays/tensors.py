"""Structure tensors and the axes that they define."""

from __future__ import annotations

import numpy as np

from volumen.derived.kernels import eigen as eigen_kernels

PLAIN_TRACE = 1e-3
"""A tensor with a smaller trace is invalid: there is no surface within the filters' width."""
MIN_GAP = 1e-3
"""Relative gap between the two smallest eigenvalues below which the axis of the smallest is undefined."""


def tensor_trace(tensor: np.ndarray) -> np.ndarray:
    """Return the trace (*spatial) of tensors in the channel order of `structure_tensor`."""
    if len(tensor) == 3:
        return tensor[0] + tensor[2]
    return tensor[0] + tensor[3] + tensor[5]


def smallest_axis(
    tensor: np.ndarray, valid: np.ndarray, min_gap: float = MIN_GAP
) -> tuple[np.ndarray, np.ndarray]:
    """Return the unit eigenvector of the smallest eigenvalue: the direction in which the structure changes least.

    The axis has no sign; the result has a positive first non-zero component in the order (z, y, x).

    Args:
        tensor: float32 (3 or 6, *spatial), channel order of `structure_tensor`.
        valid: bool (*spatial); other voxels are not computed.
        min_gap: a voxel is invalid if its two smallest eigenvalues differ by less than this fraction of the largest
            (a flat sheet in 3D), because then every direction between their axes fits equally well.

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
