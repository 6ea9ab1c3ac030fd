"""Compiled separable filters, gradients and tensor products.

Arrays are float32 (Z, Y, X). A filter along one axis has a row of weights for every output position:
`weights` (outputs, 2 r + 1) with `first`, the input position of the first output; weights at positions without a
voxel are 0. Positions outside the input are never read.
"""

from __future__ import annotations

import numpy as np

from volumen.utils.jit import compiled


@compiled
def _filter_slice(plane, weights_y, first_y, weights_x, first_x, lines, rows, out):
    """Filter one (Y, X) plane along y, then x, into `out`; `lines` is a buffer with r_x zeros on the left.

    Rows of `out` for which bool (outputs_y,) `rows` is False are 0.

    It processes four taps at a time, so that sums stay in registers; the order of additions is the same everywhere.
    """
    ny, nx = plane.shape
    taps_y = weights_y.shape[1]
    taps_x = weights_x.shape[0]
    rx = taps_x // 2
    width = out.shape[1]
    # All columns at which the whole kernel lies inside use the same weights.
    begin = min(max(rx - first_x, 0), width)
    end = max(min(nx - rx - first_x, width), begin)
    last = ny - 1
    for j in range(out.shape[0]):
        if not rows[j]:
            out[j] = np.float32(0)
            continue
        line = lines[rx : rx + nx]
        line[:] = np.float32(0)
        top = j + first_y - taps_y // 2
        for k in range(0, taps_y, 4):
            w0 = weights_y[j, k]
            w1 = weights_y[j, k + 1] if k + 1 < taps_y else np.float32(0)
            w2 = weights_y[j, k + 2] if k + 2 < taps_y else np.float32(0)
            w3 = weights_y[j, k + 3] if k + 3 < taps_y else np.float32(0)
            # Rows outside the plane have weight 0, so any row can be read instead.
            r0 = plane[min(max(top + k, 0), last)]
            r1 = plane[min(max(top + k + 1, 0), last)]
            r2 = plane[min(max(top + k + 2, 0), last)]
            r3 = plane[min(max(top + k + 3, 0), last)]
            for x in range(nx):
                line[x] += (w0 * r0[x] + w1 * r1[x]) + (w2 * r2[x] + w3 * r3[x])
        target = out[j]
        target[:] = np.float32(0)
        for k in range(0, taps_x, 4):
            count = min(4, taps_x - k)
            if end > begin:
                w0 = weights_x[k, begin]
                w1 = weights_x[k + 1, begin] if count > 1 else np.float32(0)
                w2 = weights_x[k + 2, begin] if count > 2 else np.float32(0)
                w3 = weights_x[k + 3, begin] if count > 3 else np.float32(0)
                shift = first_x + k + begin
                inner = target[begin:end]
                p0 = lines[shift : shift + inner.size]
                p1 = lines[shift + 1 : shift + 1 + inner.size]
                p2 = lines[shift + 2 : shift + 2 + inner.size]
                p3 = lines[shift + 3 : shift + 3 + inner.size]
                for x in range(inner.size):
                    inner[x] += (w0 * p0[x] + w1 * p1[x]) + (w2 * p2[x] + w3 * p3[x])
            for x in range(begin):
                target[x] += _border_sum(weights_x, lines, k, count, x, first_x)
            for x in range(end, width):
                target[x] += _border_sum(weights_x, lines, k, count, x, first_x)


@compiled
def _border_sum(weights, lines, k, count, x, first):
    """Add four taps of the row filter at one column, in the same order as at the inner columns."""
    zero = np.float32(0)
    at = first + k + x
    p0 = weights[k, x] * lines[at]
    p1 = weights[k + 1, x] * lines[at + 1] if count > 1 else zero
    p2 = weights[k + 2, x] * lines[at + 2] if count > 2 else zero
    p3 = weights[k + 3, x] * lines[at + 3] if count > 3 else zero
    return (p0 + p1) + (p2 + p3)


@compiled
def filter_planes(field, weights_y, first_y, weights_x, first_x, out):
    """Filter every (Y, X) plane along y and x.

    Args:
        field: float32 (Z, Y, X).
        weights_y: float32 (outputs, 2 r_y + 1); first_y: input position of the first output.
        weights_x: float32 (2 r_x + 1, outputs), transposed; first_x: the same for x.
        out: float32 (Z, outputs_y, outputs_x), overwritten. The caller allocates it, since NumPy requests huge
        pages.
    """
    nz, _, nx = field.shape
    lines = np.zeros(nx + weights_x.shape[0] + 4, np.float32)
    rows = np.ones(out.shape[1], np.bool_)
    for z in range(nz):
        _filter_slice(field[z], weights_y, first_y, weights_x, first_x, lines, rows, out[z])


@compiled
def filter_depth(field, weights, first, rows, out):
    """Filter along z.

    Args:
        field: float32 (C, Z, Y, X).
        weights: float32 (outputs, 2 r + 1); first: input position of the first output.
        rows: bool (outputs, Y), which rows to compute; the others are 0.
        out: float32 (C, outputs, Y, X), overwritten.
    """
    nc, nz, ny, nx = field.shape
    taps = weights.shape[1]
    last = nz - 1
    for c in range(nc):
        for i in range(weights.shape[0]):
            top = i + first - taps // 2
            for y in range(ny):
                target = out[c, i, y]
                target[:] = np.float32(0)
                if not rows[i, y]:
                    continue
                for k in range(0, taps, 4):
                    w0 = weights[i, k]
                    w1 = weights[i, k + 1] if k + 1 < taps else np.float32(0)
                    w2 = weights[i, k + 2] if k + 2 < taps else np.float32(0)
                    w3 = weights[i, k + 3] if k + 3 < taps else np.float32(0)
                    r0 = field[c, min(max(top + k, 0), last), y]
                    r1 = field[c, min(max(top + k + 1, 0), last), y]
                    r2 = field[c, min(max(top + k + 2, 0), last), y]
                    r3 = field[c, min(max(top + k + 3, 0), last), y]
                    for x in range(nx):
                        target[x] += (w0 * r0[x] + w1 * r1[x]) + (w2 * r2[x] + w3 * r3[x])


@compiled
def filter_product_planes(slope, weights_y, first_y, weights_x, first_x, rows, out):
    """Compute `filter_planes` of every product slope[i] * slope[j], i <= j, which is computed plane by plane.

    Args:
        slope: float32 (D, Z, Y, X), D = 2 or 3.
        weights_y, first_y, weights_x, first_x: as above.
        rows: bool (Z, outputs_y), which rows to compute; the others are 0.
        out: float32 (D (D + 1) / 2, Z, outputs_y, outputs_x), overwritten.
    """
    nd, nz, ny, nx = slope.shape
    lines = np.zeros(nx + weights_x.shape[0] + 4, np.float32)
    plane = np.empty((ny, nx), np.float32)
    for z in range(nz):
        if not rows[z].any():
            out[:, z] = np.float32(0)
            continue
        pair = 0
        for i in range(nd):
            for j in range(i, nd):
                for y in range(ny):
                    left = slope[i, z, y]
                    right = slope[j, z, y]
                    row = plane[y]
                    for x in range(nx):
                        row[x] = left[x] * right[x]
                _filter_slice(plane, weights_y, first_y, weights_x, first_x, lines, rows[z], out[pair, z])
                pair += 1


@compiled
def regress_lines(field, inside, kernel):
    """Apply local linear regression along the middle axis; it reproduces ramps up to the border of any volume.

    The value at 0 of the line a + b k that fits f(k) best with weights w(k), over the k inside the volume:
    (M2 S0 - M1 S1) / (M0 M2 - M1^2) with Mn = sum w k^n, Sn = sum w k^n f; S0 / M0 where that is undefined.

    Args:
        field: float32 (A, N, B), finite.
        inside: bool (A, N, B).
        kernel: float32 (2 r + 1,), symmetric.

    Returns:
        float32 (A, N, B), 0 outside the volume.
    """
    na, nn, nb = field.shape
    radius = kernel.size // 2
    out = np.zeros((na, nn, nb), np.float32)
    moments = np.empty((5, nb), np.float32)
    for a in range(na):
        for n in range(nn):
            moments[:] = np.float32(0)
            for m in range(max(0, n - radius), min(nn, n + radius + 1)):
                step = np.float32(m - n)
                weight = kernel[m - n + radius]
                for b in range(nb):
                    weight_here = weight if inside[a, m, b] else np.float32(0)
                    first = weight_here * step
                    moments[0, b] += weight_here
                    moments[1, b] += first
                    moments[2, b] += first * step
                    moments[3, b] += weight_here * field[a, m, b]
                    moments[4, b] += first * field[a, m, b]
            for b in range(nb):
                if inside[a, n, b]:
                    spread = moments[0, b] * moments[2, b] - moments[1, b] * moments[1, b]
                    if spread > np.float32(1e-6):
                        fitted = moments[2, b] * moments[3, b] - moments[1, b] * moments[4, b]
                        out[a, n, b] = fitted / spread
                    else:
                        out[a, n, b] = moments[3, b] / moments[0, b]
    return out


@compiled
def central_differences(field, starts, stops, inverse, out):
    """Compute the gradient of a part of the field: central differences, one-sided at the ends of the array.

    Args:
        field: float32 (Z, Y, X).
        starts, stops: int64 (3,), the part to compute.
        inverse: float32 (3,), 1 / spacing.
        out: float32 (3, *part), order (z, y, x), overwritten; along axes of one voxel the gradient is 0.
    """
    nz, ny, nx = field.shape
    depth, height, width = stops[0] - starts[0], stops[1] - starts[1], stops[2] - starts[2]
    half = np.float32(0.5)
    one = np.float32(1)
    x0 = starts[2]
    # Columns with a neighbour on both sides.
    begin = min(max(0, 1 - x0), width)
    end = max(min(width, nx - 1 - x0), begin)
    scale_x = inverse[2] * half
    for k in range(depth):
        z = k + starts[0]
        above, below = max(z - 1, 0), min(z + 1, nz - 1)
        scale_z = inverse[0] * (half if below - above == 2 else one)
        for j in range(height):
            y = j + starts[1]
            north, south = max(y - 1, 0), min(y + 1, ny - 1)
            scale_y = inverse[1] * (half if south - north == 2 else one)
            upper, lower = field[below, y, x0 : stops[2]], field[above, y, x0 : stops[2]]
            front, back = field[z, south, x0 : stops[2]], field[z, north, x0 : stops[2]]
            target_z, target_y, target = out[0, k, j], out[1, k, j], out[2, k, j]
            for i in range(width):
                target_z[i] = (upper[i] - lower[i]) * scale_z
            for i in range(width):
                target_y[i] = (front[i] - back[i]) * scale_y
            row = field[z, y]
            inner = target[begin:end]
            right, left = row[x0 + begin + 1 : x0 + end + 1], row[x0 + begin - 1 : x0 + end - 1]
            for i in range(inner.size):
                inner[i] = (right[i] - left[i]) * scale_x
            if x0 == 0:
                target[0] = (row[min(1, nx - 1)] - row[0]) * inverse[2]
            if stops[2] == nx:
                target[width - 1] = (row[nx - 1] - row[max(nx - 2, 0)]) * inverse[2]


@compiled
def unit_vectors(slope, valid, minimum, out):
    """Divide vectors by their norm and reverse the order of their components.

    Args:
        slope: float32 (D, N), order (z, y, x).
        valid: bool (N,), set to False where the norm is below `minimum`; vectors are 0 where it is False.
        minimum: see above.
        out: float32 (D, N), order (x, y, z), overwritten.
    """
    nd, count = slope.shape
    one = np.float32(1)
    zero = np.float32(0)
    factor = np.empty(256, np.float32)
    for begin in range(0, count, 256):
        size = min(256, count - begin)
        factor[:] = zero
        for d in range(nd):
            part = slope[d, begin : begin + size]
            for i in range(size):
                factor[i] += part[i] * part[i]
        for i in range(size):
            norm = np.sqrt(factor[i])
            good = valid[begin + i] and norm >= minimum
            valid[begin + i] = good
            factor[i] = one / norm if good else zero
        for d in range(nd):
            part = slope[d, begin : begin + size]
            target = out[nd - 1 - d, begin : begin + size]
            for i in range(size):
                target[i] = part[i] * factor[i]


@compiled
def all_within(valid, radius, start, stop):
    """Return whether all voxels up to `radius` away along the middle axis are True (those beyond the ends count as
    True).

    Args:
        valid: uint8 (A, N, B), 0 or 1.
        radius: in voxels.
        start, stop: positions to compute.

    Returns:
        uint8 (A, stop - start, B).
    """
    na, nn, nb = valid.shape
    out = np.ones((na, stop - start, nb), np.uint8)
    for a in range(na):
        for n in range(start, stop):
            row = out[a, n - start]
            for m in range(max(0, n - radius), min(nn, n + radius + 1)):
                other = valid[a, m]
                for b in range(nb):
                    row[b] &= other[b]
    return out


@compiled
def all_within_row(valid, radius, start, stop):
    """Compute `all_within` along the last axis of uint8 (A, N)."""
    na, nn = valid.shape
    out = np.empty((na, stop - start), np.uint8)
    bad = np.empty(nn + 1, np.int64)
    for a in range(na):
        bad[0] = 0
        for n in range(nn):
            bad[n + 1] = bad[n] + (1 - valid[a, n])
        if bad[nn] == 0 or bad[nn] == nn:
            out[a] = bad[nn] == 0
            continue
        for n in range(start, stop):
            out[a, n - start] = bad[min(nn, n + radius + 1)] == bad[max(0, n - radius)]
    return out
