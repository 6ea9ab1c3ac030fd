"""Compiled resampling of patches: trilinear for images, nearest for labels.

Every kernel walks an output grid of shape (nz, ny, nx) whose voxel q lies at `offset + matrix @ q` in a source
box, in voxels. A 2D image is a box with a first axis of length one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

OUTSIDE = -1


def as_box(array: np.ndarray) -> np.ndarray:
    """A 2D or 3D array as a view with three axes."""
    return array.reshape((1,) * (3 - array.ndim) + array.shape)


@njit(cache=True, nogil=True)
def nearest_index(matrix, offset, source_shape, out):
    """Writes into `out` (nz, ny, nx) int64 the flat source index nearest to each output voxel, -1 outside.

    Args:
        matrix: (3, 3) float64.
        offset: (3,) float64, source position of output voxel (0, 0, 0).
        source_shape: (3,) int64.
        out: (nz, ny, nx) int64, overwritten.
    """
    size_z, size_y, size_x = source_shape
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            base_z = offset[0] + matrix[0, 0] * z + matrix[0, 1] * y + 0.5
            base_y = offset[1] + matrix[1, 0] * z + matrix[1, 1] * y + 0.5
            base_x = offset[2] + matrix[2, 0] * z + matrix[2, 1] * y + 0.5
            for x in range(out.shape[2]):
                source_z = int(np.floor(base_z + matrix[0, 2] * x))
                source_y = int(np.floor(base_y + matrix[1, 2] * x))
                source_x = int(np.floor(base_x + matrix[2, 2] * x))
                inside = (
                    (source_z >= 0)
                    & (source_z < size_z)
                    & (source_y >= 0)
                    & (source_y < size_y)
                    & (source_x >= 0)
                    & (source_x < size_x)
                )
                flat = (source_z * size_y + source_y) * size_x + source_x
                out[z, y, x] = flat if inside else OUTSIDE


@njit(cache=True, nogil=True)
def _gather(source, index, out):
    for position in range(index.size):
        flat = index[position]
        out[position] = source[flat] if flat >= 0 else 0


def gather(source: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Values of a box at flat indices, zero where the index is -1.

    Args:
        source: (C, z, y, x), any dtype of 1, 2, 4 or 8 bytes.
        index: (nz, ny, nx) int64 from `nearest_index`.

    Returns:
        (C, nz, ny, nx) of the source's dtype.
    """
    out = np.empty((source.shape[0], *index.shape), dtype=source.dtype)
    # Bit patterns are copied whatever they mean, so that one compiled version per width serves every dtype.
    width = np.dtype(f"u{source.dtype.itemsize}")
    for channel in range(source.shape[0]):
        flat = np.ascontiguousarray(source[channel]).reshape(-1).view(width)
        _gather(flat, index.reshape(-1), out[channel].reshape(-1).view(width))
    return out


@njit(cache=True, nogil=True, fastmath=True)
def trilinear(source, matrix, offset, out):
    """Interpolates `source` (z, y, x) float32 into `out` (nz, ny, nx) float32.

    A position up to half a voxel beyond the box takes the value at its border; farther out it is zero.

    Args:
        source: (z, y, x) float32.
        matrix: (3, 3) float64.
        offset: (3,) float64.
        out: (nz, ny, nx) float32, overwritten.
    """
    size_z, size_y, size_x = source.shape
    last = out.shape[2] - 1
    step_z, step_y, step_x = matrix[0, 2], matrix[1, 2], matrix[2, 2]
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            base_z = offset[0] + matrix[0, 0] * z + matrix[0, 1] * y
            base_y = offset[1] + matrix[1, 0] * z + matrix[1, 1] * y
            base_x = offset[2] + matrix[2, 0] * z + matrix[2, 1] * y
            end_z = base_z + step_z * last
            end_y = base_y + step_y * last
            end_x = base_x + step_x * last
            # A row is a straight line: with both ends inside, no voxel of it needs a check.
            unchecked = (
                min(base_z, end_z) >= 0.0
                and max(base_z, end_z) < size_z - 1
                and min(base_y, end_y) >= 0.0
                and max(base_y, end_y) < size_y - 1
                and min(base_x, end_x) >= 0.0
                and max(base_x, end_x) < size_x - 1
            )
            if unchecked:
                for x in range(out.shape[2]):
                    at_z = base_z + step_z * x
                    at_y = base_y + step_y * x
                    at_x = base_x + step_x * x
                    z0, y0, x0 = int(at_z), int(at_y), int(at_x)
                    fz, fy, fx = np.float32(at_z - z0), np.float32(at_y - y0), np.float32(at_x - x0)
                    v00 = source[z0, y0, x0] + fx * (source[z0, y0, x0 + 1] - source[z0, y0, x0])
                    v01 = source[z0, y0 + 1, x0] + fx * (source[z0, y0 + 1, x0 + 1] - source[z0, y0 + 1, x0])
                    v10 = source[z0 + 1, y0, x0] + fx * (source[z0 + 1, y0, x0 + 1] - source[z0 + 1, y0, x0])
                    v11 = source[z0 + 1, y0 + 1, x0] + fx * (
                        source[z0 + 1, y0 + 1, x0 + 1] - source[z0 + 1, y0 + 1, x0]
                    )
                    v0 = v00 + fy * (v01 - v00)
                    v1 = v10 + fy * (v11 - v10)
                    out[z, y, x] = v0 + fz * (v1 - v0)
            else:
                for x in range(out.shape[2]):
                    at_z = base_z + step_z * x
                    at_y = base_y + step_y * x
                    at_x = base_x + step_x * x
                    if (
                        at_z < -0.5
                        or at_z >= size_z - 0.5
                        or at_y < -0.5
                        or at_y >= size_y - 0.5
                        or at_x < -0.5
                        or at_x >= size_x - 0.5
                    ):
                        out[z, y, x] = 0.0
                        continue
                    at_z = min(max(at_z, 0.0), size_z - 1.0)
                    at_y = min(max(at_y, 0.0), size_y - 1.0)
                    at_x = min(max(at_x, 0.0), size_x - 1.0)
                    z0, y0, x0 = int(at_z), int(at_y), int(at_x)
                    z1, y1, x1 = min(z0 + 1, size_z - 1), min(y0 + 1, size_y - 1), min(x0 + 1, size_x - 1)
                    fz, fy, fx = np.float32(at_z - z0), np.float32(at_y - y0), np.float32(at_x - x0)
                    v00 = source[z0, y0, x0] + fx * (source[z0, y0, x1] - source[z0, y0, x0])
                    v01 = source[z0, y1, x0] + fx * (source[z0, y1, x1] - source[z0, y1, x0])
                    v10 = source[z1, y0, x0] + fx * (source[z1, y0, x1] - source[z1, y0, x0])
                    v11 = source[z1, y1, x0] + fx * (source[z1, y1, x1] - source[z1, y1, x0])
                    v0 = v00 + fy * (v01 - v00)
                    v1 = v10 + fy * (v11 - v10)
                    out[z, y, x] = v0 + fz * (v1 - v0)


@njit(cache=True, nogil=True, fastmath=True)
def separable_linear(source, z0, z1, wz, y0, y1, wy, x0, x1, wx, out):
    """Linear interpolation on a grid whose axes are those of the source: a sum of two taps per axis.

    Output voxel i along an axis is `(1 - w[i]) * source[first[i]] + w[i] * source[second[i]]`; a first tap of -1
    makes it zero.

    Args:
        source: (z, y, x) float32.
        z0, z1, wz, y0, y1, wy, x0, x1, wx: taps (int64) and weights (float32) of each axis of `out`.
        out: (nz, ny, nx) float32, overwritten.
    """
    size_y, size_x = source.shape[1:]
    plane = np.empty((size_y, size_x), dtype=np.float32)
    row = np.empty(size_x, dtype=np.float32)
    for z in range(out.shape[0]):
        if z0[z] < 0:
            out[z] = 0.0
            continue
        for y in range(size_y):
            for x in range(size_x):
                first = source[z0[z], y, x]
                plane[y, x] = first + wz[z] * (source[z1[z], y, x] - first)
        for y in range(out.shape[1]):
            if y0[y] < 0:
                out[z, y] = 0.0
                continue
            for x in range(size_x):
                first = plane[y0[y], x]
                row[x] = first + wy[y] * (plane[y1[y], x] - first)
            for x in range(out.shape[2]):
                tap = max(x0[x], 0)
                value = row[tap] + wx[x] * (row[x1[x]] - row[tap])
                out[z, y, x] = value if x0[x] >= 0 else np.float32(0.0)
