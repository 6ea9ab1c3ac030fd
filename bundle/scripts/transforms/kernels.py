"""Compiled inner loops of the derived targets: distances by minima along lines, filters along one axis.

All take and return C-contiguous arrays of three axes (Z, Y, X); a 2D image has Z = 1. They are compiled
once per machine (numba's on-disk cache), so that a data-loading worker loads them instead of compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

FAR = np.float32(1e30)
"""Squared distance that stands for "no such voxel"; far below float32 overflow, so that sums stay finite."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, keeping the machine code on disk where some folder can be written.

    numba tries the folder of the source file, then NUMBA_CACHE_DIR or the user's cache folder. Where none of
    them is writable (a read-only container) it refuses to make a cache, and the function is compiled afresh
    in every process instead.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@compiled
def nearest_along_x(feature, cost):
    """Squared distance to the nearest True voxel of the same row.

    Args:
        feature: bool (Z, Y, X).
        cost: float32 (K + 1,), squared distance of a step of 0..K voxels; further ones are FAR.

    Returns:
        float32 (Z, Y, X).
    """
    nz, ny, nx = feature.shape
    far = np.float32(1e30)
    out = np.empty((nz, ny, nx), np.float32)
    last = cost.size - 1
    for z in range(nz):
        for y in range(ny):
            steps = last + 1
            for x in range(nx):
                steps = 0 if feature[z, y, x] else steps + 1
                out[z, y, x] = cost[steps] if steps <= last else far
            steps = last + 1
            for x in range(nx - 1, -1, -1):
                steps = 0 if feature[z, y, x] else steps + 1
                if steps <= last and cost[steps] < out[z, y, x]:
                    out[z, y, x] = cost[steps]
    return out


@compiled
def nearest_along_middle(squared, cost):
    """Minimum over steps k along the middle axis of `squared + cost[|k|]`.

    Args:
        squared: float32 (A, N, B), squared distances within the lines of the axes done before.
        cost: float32 (K + 1,), squared distance of a step of 0..K voxels along this axis.

    Returns:
        float32 (A, N, B).
    """
    na, nn, nb = squared.shape
    out = squared.copy()
    reach = cost.size - 1
    for a in range(na):
        for n in range(nn):
            row = out[a, n]
            for m in range(max(0, n - reach), min(nn, n + reach + 1)):
                step = cost[abs(m - n)]
                other = squared[a, m]
                for b in range(nb):
                    value = other[b] + step
                    row[b] = min(value, row[b])
    return out


@compiled
def filter_middle(field, weights):
    """Weighted sum along the middle axis, with weights of its own for every position.

    Args:
        field: float32 (A, N, B).
        weights: float32 (N, 2 r + 1); weights[n, k] belongs to the voxel n + k - r, and is 0 where there is
        none.

    Returns:
        float32 (A, N, B).
    """
    na, nn, nb = field.shape
    radius = weights.shape[1] // 2
    out = np.zeros((na, nn, nb), np.float32)
    for a in range(na):
        for n in range(nn):
            row = out[a, n]
            for m in range(max(0, n - radius), min(nn, n + radius + 1)):
                weight = weights[n, m - n + radius]
                other = field[a, m]
                for b in range(nb):
                    row[b] += weight * other[b]
    return out


@compiled
def filter_last(field, weights):
    """`filter_middle` along the last axis of a float32 (A, N) array."""
    na, nn = field.shape
    radius = weights.shape[1] // 2
    out = np.zeros((na, nn), np.float32)
    for a in range(na):
        for n in range(nn):
            total = np.float32(0)
            for m in range(max(0, n - radius), min(nn, n + radius + 1)):
                total += weights[n, m - n + radius] * field[a, m]
            out[a, n] = total
    return out


@compiled
def smallest_axis_3d(tensor, valid, min_gap):
    """Unit eigenvector of the smallest eigenvalue of symmetric 3 x 3 tensors.

    Eigenvalues by the trigonometric solution of the characteristic polynomial (Smith 1961). The eigenvector
    of the eigenvalue that stands furthest from the others comes from the largest cross product of two rows of
    A - lambda I, which is well conditioned there; the other two are solved as a 2 x 2 problem in its
    orthogonal plane (Eberly, "A Robust Eigensolver for 3 x 3 Symmetric Matrices", 2014), so that nearly equal
    eigenvalues do no harm.

    Args:
        tensor: float32 (6, N), order (zz, zy, zx, yy, yx, xx).
        valid: bool (N,); where False nothing is computed and the vector is 0. Set to False where the two
            smallest eigenvalues differ by less than `min_gap` times the largest: the axis is undefined there.
        min_gap: see above.

    Returns:
        float32 (3, N), order (x, y, z), sign such that the first non-zero component of (z, y, x) is positive.
    """
    count = tensor.shape[1]
    out = np.zeros((3, count), np.float32)
    for i in range(count):
        if not valid[i]:
            continue
        a00 = np.float64(tensor[0, i])
        a01 = np.float64(tensor[1, i])
        a02 = np.float64(tensor[2, i])
        a11 = np.float64(tensor[3, i])
        a12 = np.float64(tensor[4, i])
        a22 = np.float64(tensor[5, i])
        scale = max(max(abs(a00), abs(a11)), max(abs(a22), max(abs(a01), max(abs(a02), abs(a12)))))
        if scale == 0.0:
            valid[i] = False
            continue
        a00, a01, a02 = a00 / scale, a01 / scale, a02 / scale
        a11, a12, a22 = a11 / scale, a12 / scale, a22 / scale
        mean = (a00 + a11 + a22) / 3.0
        b00, b11, b22 = a00 - mean, a11 - mean, a22 - mean
        off = a01 * a01 + a02 * a02 + a12 * a12
        p = np.sqrt((b00 * b00 + b11 * b11 + b22 * b22 + 2.0 * off) / 6.0)
        if p < 1e-12:
            valid[i] = False
            continue
        det = b00 * (b11 * b22 - a12 * a12) - a01 * (a01 * b22 - a12 * a02) + a02 * (a01 * a12 - b11 * a02)
        half = min(1.0, max(-1.0, det / (2.0 * p * p * p)))
        # The isolated eigenvalue is the largest when half >= 0, else the smallest.
        angle = np.arccos(half) / 3.0
        if half >= 0.0:
            isolated = 2.0 * p * np.cos(angle)
        else:
            isolated = 2.0 * p * np.cos(angle + 2.0943951023931953)
        r00, r11, r22 = b00 - isolated, b11 - isolated, b22 - isolated
        # Cross products of the rows (r00, a01, a02), (a01, r11, a12), (a02, a12, r22).
        x0, x1, x2 = a01 * a12 - a02 * r11, a02 * a01 - r00 * a12, r00 * r11 - a01 * a01
        y0, y1, y2 = a01 * r22 - a02 * a12, a02 * a02 - r00 * r22, r00 * a12 - a01 * a02
        z0, z1, z2 = r11 * r22 - a12 * a12, a12 * a02 - a01 * r22, a01 * a12 - r11 * a02
        nx, ny, nz = x0 * x0 + x1 * x1 + x2 * x2, y0 * y0 + y1 * y1 + y2 * y2, z0 * z0 + z1 * z1 + z2 * z2
        if nx >= ny and nx >= nz:
            v0, v1, v2, norm = x0, x1, x2, nx
        elif ny >= nz:
            v0, v1, v2, norm = y0, y1, y2, ny
        else:
            v0, v1, v2, norm = z0, z1, z2, nz
        norm = 1.0 / np.sqrt(norm)
        v0, v1, v2 = v0 * norm, v1 * norm, v2 * norm
        # Orthonormal basis (u, w) of the plane across v, then the 2 x 2 problem in it.
        if abs(v0) > abs(v1):
            inverse = 1.0 / np.sqrt(v0 * v0 + v2 * v2)
            u0, u1, u2 = -v2 * inverse, 0.0, v0 * inverse
        else:
            inverse = 1.0 / np.sqrt(v1 * v1 + v2 * v2)
            u0, u1, u2 = 0.0, v2 * inverse, -v1 * inverse
        w0, w1, w2 = v1 * u2 - v2 * u1, v2 * u0 - v0 * u2, v0 * u1 - v1 * u0
        bu0 = b00 * u0 + a01 * u1 + a02 * u2
        bu1 = a01 * u0 + b11 * u1 + a12 * u2
        bu2 = a02 * u0 + a12 * u1 + b22 * u2
        m00 = u0 * bu0 + u1 * bu1 + u2 * bu2
        m01 = w0 * bu0 + w1 * bu1 + w2 * bu2
        bw0 = b00 * w0 + a01 * w1 + a02 * w2
        bw1 = a01 * w0 + b11 * w1 + a12 * w2
        bw2 = a02 * w0 + a12 * w1 + b22 * w2
        m11 = w0 * bw0 + w1 * bw1 + w2 * bw2
        delta = 0.5 * (m00 - m11)
        root = np.sqrt(delta * delta + m01 * m01)
        low = 0.5 * (m00 + m11) - root
        if half >= 0.0:
            gap = 2.0 * root
            largest = isolated + mean
            # Eigenvector of the smaller value of the 2 x 2 block, by the better conditioned of two forms.
            if delta > 0.0:
                c, s = -m01, delta + root
            else:
                c, s = root - delta, -m01
            length = np.sqrt(c * c + s * s)
            if length < 1e-14:
                valid[i] = False
                continue
            c, s = c / length, s / length
            e0, e1, e2 = c * u0 + s * w0, c * u1 + s * w1, c * u2 + s * w2
        else:
            gap = low - isolated
            largest = low + 2.0 * root + mean
            e0, e1, e2 = v0, v1, v2
        if gap < min_gap * abs(largest):
            valid[i] = False
            continue
        lead = e0 if abs(e0) > 1e-6 else (e1 if abs(e1) > 1e-6 else e2)
        sign = -1.0 if lead < 0.0 else 1.0
        out[0, i] = sign * e2
        out[1, i] = sign * e1
        out[2, i] = sign * e0
    return out


@compiled
def smallest_axis_2d(tensor, valid, min_gap):
    """`smallest_axis_3d` for 2 x 2 tensors (yy, yx, xx): (3, N) in, (2, N) out in the order (x, y)."""
    count = tensor.shape[1]
    out = np.zeros((2, count), np.float32)
    for i in range(count):
        if not valid[i]:
            continue
        yy = np.float64(tensor[0, i])
        yx = np.float64(tensor[1, i])
        xx = np.float64(tensor[2, i])
        delta = 0.5 * (yy - xx)
        root = np.sqrt(delta * delta + yx * yx)
        if root == 0.0 or 2.0 * root < min_gap * abs(0.5 * (yy + xx) + root):
            valid[i] = False
            continue
        if delta > 0.0:
            e0, e1 = -yx, delta + root
        else:
            e0, e1 = root - delta, -yx
        length = np.sqrt(e0 * e0 + e1 * e1)
        lead = e0 if abs(e0) > 1e-6 * length else e1
        sign = (-1.0 if lead < 0.0 else 1.0) / length
        out[0, i] = sign * e1
        out[1, i] = sign * e0
    return out
