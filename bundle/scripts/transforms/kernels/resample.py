"""Compiled resampling of single-channel boxes: linear for images, nearest for labels.

A grid of shape (nz, ny, nx) lies in a source box (z, y, x): its voxel q sits at `offset + matrix @ q`, in
voxels of the box. A 2D image is a box whose first axis has length one.
"""

from __future__ import annotations

import numpy as np

from volumen.utils.jit import compiled

OUTSIDE = -1
_TILE = 32  # edge of the output tiles, so that the source of one tile fits into the cache
_EXACT = 1e-9  # voxels; above the rounding of a matrix product, far below what changes a value
_INTERPOLATED = ("uint8", "uint16", "int16", "float32")


def as_box(array: np.ndarray) -> np.ndarray:
    """Return a 2D or 3D array as a view with three axes."""
    return array.reshape((1,) * (3 - array.ndim) + array.shape)


def linear(
    source: np.ndarray, matrix: np.ndarray, offset: np.ndarray, outside: float, out: np.ndarray
) -> np.ndarray:
    """Sample a box on a grid by linear interpolation, by the cheapest of three equivalent methods.

    A position up to half a voxel beyond the box gets the value at its border, a farther one gets `outside`; so a
    voxel is outside exactly where `nearest_index` is -1.

    Args:
        source: (z, y, x), any real dtype.
        matrix: (3, 3) float64.
        offset: (3,) float64.
        outside: value for positions outside the box.
        out: (nz, ny, nx) float32, contiguous, overwritten.

    Returns:
        `out`.
    """
    if source.dtype.name not in _INTERPOLATED:
        source = source.astype(np.float32)
    source = np.ascontiguousarray(source)
    fill = np.float32(outside)
    if np.array_equal(matrix, np.diag(np.diag(matrix))):
        taps = [_taps(*axis) for axis in zip(np.diag(matrix), offset, out.shape, source.shape)]
        blend_separably(source, *taps[0], *taps[1], *taps[2], fill, out)
    elif _in_plane(matrix, offset):
        first = np.rint(offset[0] + matrix[0, 0] * np.arange(out.shape[0])).astype(np.int64)
        planes = np.where((first >= 0) & (first < len(source)), first, OUTSIDE)
        _bilinear(source, planes, matrix[1:, 1:].copy(), offset[1:].copy(), fill, out)
    else:
        _trilinear(source, matrix, offset, fill, out)
    return out


def spline(
    source: np.ndarray, matrix: np.ndarray, offset: np.ndarray, outside: float, out: np.ndarray
) -> np.ndarray:
    """Do the same as `linear`, by cubic splines (SciPy); arguments and result are the same."""
    from scipy.ndimage import affine_transform

    shape = source.shape
    affine_transform(source.astype(np.float32), matrix, offset, output=out, order=3, mode="nearest")
    out[nearest_index(shape, matrix, offset, out.shape) < 0] = outside
    return out


def linear_taps(positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two source voxels, and the weight of the second, that interpolate at `positions` along an axis.

    Args:
        positions: (n,) float64, voxels.
        size: voxels of the source along the axis.

    Returns:
        First and second voxel (n,) int64, the first -1 more than half a voxel outside; weight (n,) float32.
    """
    inside = (positions >= -0.5) & (positions < size - 0.5)
    at = np.clip(positions, 0, size - 1)
    first = at.astype(np.int64)
    second = np.minimum(first + 1, size - 1)
    return np.where(inside, first, OUTSIDE), second, (at - first).astype(np.float32)


def gather(source: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the values of a box at flat indices, zero where the index is -1.

    Args:
        source: (C, z, y, x), any dtype of 1, 2, 4 or 8 bytes.
        index: (nz, ny, nx) int64 from `nearest_index`.

    Returns:
        (C, nz, ny, nx) of the source's dtype.
    """
    out = np.empty((source.shape[0], *index.shape), dtype=source.dtype)
    # Bit patterns are copied without interpretation, so that one compiled version per width serves every dtype.
    width = np.dtype(f"u{source.dtype.itemsize}")
    for channel in range(source.shape[0]):
        flat = np.ascontiguousarray(source[channel]).reshape(-1).view(width)
        _gather(flat, index.reshape(-1), out[channel].reshape(-1).view(width))
    return out


def nearest_index(
    source_shape: tuple[int, ...], matrix: np.ndarray, offset: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the flat index into a box of the voxel nearest to each voxel of a grid, -1 outside.

    Args:
        source_shape: (z, y, x) of the box.
        matrix: (3, 3) float64.
        offset: (3,) float64.
        shape: (nz, ny, nx) of the grid.

    Returns:
        (nz, ny, nx) int64. A position halfway between two voxels takes the later one.
    """
    index = np.empty(shape, dtype=np.int64)
    _nearest_index(matrix, offset, np.asarray(source_shape, dtype=np.int64), index)
    return index


def _taps(step: float, offset: float, size: int, source: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return linear_taps(offset + step * np.arange(size), source)


def _in_plane(matrix: np.ndarray, offset: np.ndarray) -> bool:
    # True if the first axis is at most mirrored, and planes are mapped to planes.
    apart = not matrix[0, 1:].any() and not matrix[1:, 0].any()
    return bool(
        apart and abs(abs(matrix[0, 0]) - 1) < _EXACT and abs(offset[0] - np.rint(offset[0])) < _EXACT
    )


@compiled
def _nearest_index(matrix, offset, source_shape, out):
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


@compiled
def _gather(source, index, out):
    for position in range(index.size):
        flat = index[position]
        out[position] = source[flat] if flat >= 0 else 0


@compiled
def blend_separably(source, z0, z1, wz, y0, y1, wy, x0, x1, wx, outside, out):
    # Blends two planes, then two rows, then two voxels: the first two vectorise.
    size_y, size_x = source.shape[1:]
    plane = np.empty((size_y, size_x), dtype=np.float32)
    row = np.empty(size_x, dtype=np.float32)
    for z in range(out.shape[0]):
        if z0[z] < 0:
            out[z] = outside
            continue
        for y in range(size_y):
            before, after, blended = source[z0[z], y], source[z1[z], y], plane[y]
            for x in range(size_x):
                first = np.float32(before[x])
                blended[x] = first + wz[z] * (np.float32(after[x]) - first)
        for y in range(out.shape[1]):
            line = out[z, y]
            if y0[y] < 0:
                line[:] = outside
                continue
            upper, lower = plane[y0[y]], plane[y1[y]]
            for x in range(size_x):
                row[x] = upper[x] + wy[y] * (lower[x] - upper[x])
            for x in range(line.size):
                # Unsigned indices avoid the check for a negative one.
                first = row[np.uintp(max(x0[x], 0))]
                value = first + wx[x] * (row[np.uintp(x1[x])] - first)
                line[x] = value if x0[x] >= 0 else outside


@compiled
def _bilinear(source, planes, matrix, offset, outside, out):
    size_y, size_x = source.shape[1:]
    width = np.uintp(size_x)
    one = np.uintp(1)
    step_y, step_x = matrix[0, 1], matrix[1, 1]
    last = out.shape[2] - 1
    corner = np.empty(out.shape[2], dtype=np.int64)
    weight_y = np.empty(out.shape[2], dtype=np.float32)
    weight_x = np.empty(out.shape[2], dtype=np.float32)
    for z in range(out.shape[0]):
        if planes[z] < 0:
            out[z] = outside
            continue
        flat = source[planes[z]].reshape(-1)
        for y in range(out.shape[1]):
            line = out[z, y]
            base_y, base_x = offset[0] + matrix[0, 0] * y, offset[1] + matrix[1, 0] * y
            end_y, end_x = base_y + step_y * last, base_x + step_x * last
            if (
                min(base_y, end_y) >= 0.0
                and max(base_y, end_y) < size_y - 1
                and min(base_x, end_x) >= 0.0
                and max(base_x, end_x) < size_x - 1
            ):
                for x in range(line.size):
                    at_y, at_x = base_y + step_y * x, base_x + step_x * x
                    y0, x0 = int(at_y), int(at_x)
                    weight_y[x], weight_x[x] = at_y - y0, at_x - x0
                    corner[x] = y0 * size_x + x0
                for x in range(line.size):
                    near = np.uintp(corner[x])
                    v0 = np.float32(flat[near])
                    v0 += weight_x[x] * (np.float32(flat[near + one]) - v0)
                    v1 = np.float32(flat[near + width])
                    v1 += weight_x[x] * (np.float32(flat[near + width + one]) - v1)
                    line[x] = v0 + weight_y[x] * (v1 - v0)
                continue
            for x in range(line.size):
                at_y, at_x = base_y + step_y * x, base_x + step_x * x
                if at_y < -0.5 or at_y >= size_y - 0.5 or at_x < -0.5 or at_x >= size_x - 0.5:
                    line[x] = outside
                    continue
                at_y, at_x = min(max(at_y, 0.0), size_y - 1.0), min(max(at_x, 0.0), size_x - 1.0)
                y0, x0 = int(at_y), int(at_x)
                y1, x1 = min(y0 + 1, size_y - 1), min(x0 + 1, size_x - 1)
                fy, fx = np.float32(at_y - y0), np.float32(at_x - x0)
                v00, v01 = np.float32(flat[y0 * size_x + x0]), np.float32(flat[y0 * size_x + x1])
                v10, v11 = np.float32(flat[y1 * size_x + x0]), np.float32(flat[y1 * size_x + x1])
                v0, v1 = v00 + fx * (v01 - v00), v10 + fx * (v11 - v10)
                line[x] = v0 + fy * (v1 - v0)


@compiled
def _trilinear(source, matrix, offset, outside, out):
    step_z, step_y, step_x = matrix[0, 2], matrix[1, 2], matrix[2, 2]
    top_z, top_y, top_x = source.shape[0] - 1.0, source.shape[1] - 1.0, source.shape[2] - 1.0
    flat = source.reshape(-1)
    width, area = source.shape[2], source.shape[1] * source.shape[2]
    last = out.shape[2] - 1
    corner = np.empty(out.shape[2], dtype=np.int64)
    weight_z, weight_y, weight_x = (
        np.empty(out.shape[2], dtype=np.float32),
        np.empty(out.shape[2], dtype=np.float32),
        np.empty(out.shape[2], dtype=np.float32),
    )
    for tile_z in range(0, out.shape[0], _TILE):
        for tile_y in range(0, out.shape[1], _TILE):
            for z in range(tile_z, min(tile_z + _TILE, out.shape[0])):
                for y in range(tile_y, min(tile_y + _TILE, out.shape[1])):
                    line = out[z, y]
                    base_z = offset[0] + matrix[0, 0] * z + matrix[0, 1] * y
                    base_y = offset[1] + matrix[1, 0] * z + matrix[1, 1] * y
                    base_x = offset[2] + matrix[2, 0] * z + matrix[2, 1] * y
                    end_z, end_y, end_x = (
                        base_z + step_z * last,
                        base_y + step_y * last,
                        base_x + step_x * last,
                    )
                    # A line is straight: if both ends are inside, no voxel of it needs a check.
                    if not (
                        min(base_z, base_y, base_x, end_z, end_y, end_x) >= 0.0
                        and max(base_z, end_z) < top_z
                        and max(base_y, end_y) < top_y
                        and max(base_x, end_x) < top_x
                    ):
                        base, step = (base_z, base_y, base_x), (step_z, step_y, step_x)
                        _line_checked(source, base, step, (top_z, top_y, top_x), outside, line)
                        continue
                    for x in range(line.size):
                        at_z, at_y, at_x = base_z + step_z * x, base_y + step_y * x, base_x + step_x * x
                        z0, y0, x0 = int(at_z), int(at_y), int(at_x)
                        weight_z[x], weight_y[x], weight_x[x] = at_z - z0, at_y - y0, at_x - x0
                        corner[x] = z0 * area + y0 * width + x0
                    _blend_corners(flat, corner, width, area, weight_z, weight_y, weight_x, line)


@compiled
def _blend_corners(flat, corner, width, area, weight_z, weight_y, weight_x, line):
    # Unsigned indices avoid the check for a negative one.
    row, plane, one = np.uintp(width), np.uintp(area), np.uintp(1)
    for x in range(line.size):
        near = np.uintp(corner[x])
        far = near + plane
        fx, fy = weight_x[x], weight_y[x]
        v00 = np.float32(flat[near])
        v00 += fx * (np.float32(flat[near + one]) - v00)
        v01 = np.float32(flat[near + row])
        v01 += fx * (np.float32(flat[near + row + one]) - v01)
        v10 = np.float32(flat[far])
        v10 += fx * (np.float32(flat[far + one]) - v10)
        v11 = np.float32(flat[far + row])
        v11 += fx * (np.float32(flat[far + row + one]) - v11)
        v0, v1 = v00 + fy * (v01 - v00), v10 + fy * (v11 - v10)
        line[x] = v0 + weight_z[x] * (v1 - v0)


@compiled
def _line_checked(source, base, step, top, outside, line):
    for x in range(line.size):
        at_z, at_y, at_x = base[0] + step[0] * x, base[1] + step[1] * x, base[2] + step[2] * x
        if (
            min(at_z, at_y, at_x) < -0.5
            or at_z >= top[0] + 0.5
            or at_y >= top[1] + 0.5
            or at_x >= top[2] + 0.5
        ):
            line[x] = outside
            continue
        at_z, at_y, at_x = (
            min(max(at_z, 0.0), top[0]),
            min(max(at_y, 0.0), top[1]),
            min(max(at_x, 0.0), top[2]),
        )
        z0, y0, x0 = int(at_z), int(at_y), int(at_x)
        z1, y1, x1 = min(z0 + 1, int(top[0])), min(y0 + 1, int(top[1])), min(x0 + 1, int(top[2]))
        fz, fy, fx = np.float32(at_z - z0), np.float32(at_y - y0), np.float32(at_x - x0)
        v00 = np.float32(source[z0, y0, x0])
        v00 += fx * (np.float32(source[z0, y0, x1]) - v00)
        v01 = np.float32(source[z0, y1, x0])
        v01 += fx * (np.float32(source[z0, y1, x1]) - v01)
        v10 = np.float32(source[z1, y0, x0])
        v10 += fx * (np.float32(source[z1, y0, x1]) - v10)
        v11 = np.float32(source[z1, y1, x0])
        v11 += fx * (np.float32(source[z1, y1, x1]) - v11)
        v0, v1 = v00 + fy * (v01 - v00), v10 + fy * (v11 - v10)
        line[x] = v0 + fz * (v1 - v0)
