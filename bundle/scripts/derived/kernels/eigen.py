"""Compiled eigenvectors of symmetric 2 x 2 and 3 x 3 tensors, written without branches so that they
vectorise."""

from __future__ import annotations

import numpy as np

from volumen.utils.jit import compiled


@compiled
def smallest_axis_3d(tensor, valid, min_gap, out):
    """Compute the unit eigenvector of the smallest eigenvalue of symmetric 3 x 3 tensors, in float64.

    With A = mean I + p B (B of zero trace, |B|^2 = 6) the eigenvalues of B are the roots of
    t^3 - 3 t - det B = 0 (Smith, "Eigenvalues of a symmetric 3 x 3 matrix", 1961). The root that is
    farthest from the two others lies within [sqrt 3, 2] up to sign and is simple, so that Newton's iteration
    from a quadratic guess (off by 1e-3 at most) is exact to 1e-13 after two steps. Its eigenvector is the
    largest cross product of two rows of A - lambda I, well conditioned for an isolated root; the other two
    are solved as a 2 x 2 problem in the plane perpendicular to it (Eberly, "A Robust Eigensolver for 3 x 3 Symmetric
    Matrices", 2014), so that nearly equal eigenvalues cause no loss of accuracy.

    Args:
        tensor: float32 (6, N), order (zz, zy, zx, yy, yx, xx).
        valid: bool (N,), set to False where the two smallest eigenvalues differ by less than `min_gap` times
            the largest: the axis is undefined there. Vectors are 0 where it is False.
        min_gap: see above, positive.
        out: float32 (3, N), overwritten: order (x, y, z), sign such that the first component of (z, y, x)
        that
            is not 0 is positive.
    """
    count = tensor.shape[1]
    # Blocks pass through one small buffer, in which the compiler sees that reads and writes do not
    # overlap; so it vectorises.
    work = np.zeros((10, 64), np.float64)
    for begin in range(0, count, 64):
        size = min(64, count - begin)
        any_valid = False
        for i in range(size):
            any_valid |= valid[begin + i]
            work[9, i] = 1.0 if valid[begin + i] else 0.0
        if not any_valid:
            out[:, begin : begin + size] = np.float32(0)
            continue
        for row in range(6):
            for i in range(size):
                work[row, i] = tensor[row, begin + i]
        for i in range(64):
            a00 = work[0, i]
            a01 = work[1, i]
            a02 = work[2, i]
            a11 = work[3, i]
            a12 = work[4, i]
            a22 = work[5, i]
            mean = (a00 + a11 + a22) * (1.0 / 3.0)
            b00, b11, b22 = a00 - mean, a11 - mean, a22 - mean
            off = a01 * a01 + a02 * a02 + a12 * a12
            square = (b00 * b00 + b11 * b11 + b22 * b22 + 2.0 * off) * (1.0 / 6.0)
            # The input is float32: smaller values are rounding of a multiple of the identity (or a zero tensor).
            good = square > 1e-14 * mean * mean + 1e-60
            p = np.sqrt(square) if good else np.float64(1)
            inverse = 1.0 / p
            b00, b11, b22 = b00 * inverse, b11 * inverse, b22 * inverse
            b01, b02, b12 = a01 * inverse, a02 * inverse, a12 * inverse
            minor0 = b11 * b22 - b12 * b12
            minor1 = b01 * b22 - b12 * b02
            minor2 = b01 * b12 - b11 * b02
            det = b00 * minor0 - b01 * minor1 + b02 * minor2
            top = det >= 0.0
            half = 0.5 * abs(det)
            half = half if half < 1.0 else np.float64(1)
            t = np.float64(1.7320508075688772) + half * (0.3214063 - 0.0534571 * half)
            t = t - (t * t * t - 3.0 * t - 2.0 * half) / (3.0 * t * t - 3.0)
            t = t - (t * t * t - 3.0 * t - 2.0 * half) / (3.0 * t * t - 3.0)
            root = t if top else -t
            r00, r11, r22 = b00 - root, b11 - root, b22 - root
            x0, x1, x2 = b01 * b12 - b02 * r11, b02 * b01 - r00 * b12, r00 * r11 - b01 * b01
            y0, y1, y2 = b01 * r22 - b02 * b12, b02 * b02 - r00 * r22, r00 * b12 - b01 * b02
            z0, z1, z2 = r11 * r22 - b12 * b12, b12 * b02 - b01 * r22, b01 * b12 - r11 * b02
            nx = x0 * x0 + x1 * x1 + x2 * x2
            ny = y0 * y0 + y1 * y1 + y2 * y2
            nz = z0 * z0 + z1 * z1 + z2 * z2
            second = ny > nx
            v0, v1, v2 = y0 if second else x0, y1 if second else x1, y2 if second else x2
            norm = ny if second else nx
            third = nz > norm
            v0, v1, v2 = z0 if third else v0, z1 if third else v1, z2 if third else v2
            norm = nz if third else norm
            norm = norm if norm > 1e-30 else np.float64(1)
            scale = 1.0 / np.sqrt(norm)
            v0, v1, v2 = v0 * scale, v1 * scale, v2 * scale
            # Orthonormal basis (u, w) of the plane perpendicular to v: cross v with the axis of its smaller component.
            swap = abs(v0) > abs(v1)
            planar = (v0 * v0 if swap else v1 * v1) + v2 * v2
            planar = planar if planar > 1e-30 else np.float64(1)
            scale = 1.0 / np.sqrt(planar)
            u0 = -v2 * scale if swap else np.float64(0)
            u1 = np.float64(0) if swap else v2 * scale
            u2 = (v0 if swap else -v1) * scale
            w0, w1, w2 = v1 * u2 - v2 * u1, v2 * u0 - v0 * u2, v0 * u1 - v1 * u0
            c0 = b00 * u0 + b01 * u1 + b02 * u2
            c1 = b01 * u0 + b11 * u1 + b12 * u2
            c2 = b02 * u0 + b12 * u1 + b22 * u2
            m00 = u0 * c0 + u1 * c1 + u2 * c2
            m01 = w0 * c0 + w1 * c1 + w2 * c2
            # The trace of B is 0.
            m11 = -root - m00
            delta = 0.5 * (m00 - m11)
            spread = np.sqrt(delta * delta + m01 * m01)
            low = -0.5 * root - spread
            # Eigenvector of the smaller eigenvalue of the 2 x 2 block, in the form without cancellation.
            steep = delta > 0.0
            c = -m01 if steep else spread - delta
            s = delta + spread if steep else -m01
            length = c * c + s * s
            length = length if length > 1e-40 else np.float64(1)
            scale = 1.0 / np.sqrt(length)
            c, s = c * scale, s * scale
            e0 = c * u0 + s * w0 if top else v0
            e1 = c * u1 + s * w1 if top else v1
            e2 = c * u2 + s * w2 if top else v2
            gap = 2.0 * spread if top else low - root
            largest = root if top else low + 2.0 * spread
            good = good and work[9, i] > 0.0 and gap * p >= min_gap * (largest * p + mean)
            lead = e0 if abs(e0) > 1e-6 else (e1 if abs(e1) > 1e-6 else e2)
            sign = (-1.0 if lead < 0.0 else 1.0) if good else 0.0
            work[6, i] = sign * e2
            work[7, i] = sign * e1
            work[8, i] = sign * e0
            work[9, i] = sign
        for i in range(size):
            valid[begin + i] = work[9, i] != 0.0
        for row in range(3):
            for i in range(size):
                out[row, begin + i] = work[6 + row, i]


@compiled
def smallest_axis_2d(tensor, valid, min_gap, out):
    """Compute `smallest_axis_3d` for 2 x 2 tensors (yy, yx, xx): float32 (3, N) in, (2, N) out in the order (x,
    y)."""
    count = tensor.shape[1]
    for i in range(count):
        yy = np.float64(tensor[0, i])
        yx = np.float64(tensor[1, i])
        xx = np.float64(tensor[2, i])
        delta = 0.5 * (yy - xx)
        mean = 0.5 * (yy + xx)
        spread = np.sqrt(delta * delta + yx * yx)
        good = valid[i] and spread > 1e-30 and 2.0 * spread >= min_gap * (mean + spread)
        steep = delta > 0.0
        e0 = -yx if steep else spread - delta
        e1 = delta + spread if steep else -yx
        length = np.sqrt(e0 * e0 + e1 * e1) if good else np.float64(1)
        lead = e0 if abs(e0) > 1e-6 * length else e1
        sign = ((-1.0 if lead < 0.0 else 1.0) if good else 0.0) / length
        valid[i] = good
        out[0, i] = sign * e1
        out[1, i] = sign * e0
