"""Compiled separable filters, gradients and tensor products.

Arrays are float32 (Z, Y, X). A filter along one axis has a row of weights for every output position:
`weights` (outputs, 2 r + 1) with `first`, the input position of the first output; weights that would meet no
voxel are 0. Positions outside the input are never read.
"""

from __future__ import annotations

import numpy as np

from scripts.transforms.jit import compiled


@compiled
def _filter_slice(plane, weights_y, first_y, weights_x, first_x, lines, out):
    """Filter one (Y, X) plane along y, then x, into `out`; `lines` is scratch (r_x zeros on both sides)."""
    ny, nx = plane.shape
    ry = weights_y.shape[1] // 2
    rx = weights_x.shape[0] // 2
    taps = weights_x.shape[0]
    width = out.shape[1]
    for j in range(out.shape[0]):
        line = lines[rx : rx + nx]
        line[:] = np.float32(0)
        centre = j + first_y
        for y in range(max(0, centre - ry), min(ny, centre + ry + 1)):
            weight = weights_y[j, y - centre + ry]
            row = plane[y]
            for x in range(nx):
                line[x] += weight * row[x]
        target = out[j]
        target[:] = np.float32(0)
        for k in range(taps):
            part = lines[first_x + k : first_x + k + width]
            weight_k = weights_x[k]
            for x in range(width):
                target[x] += weight_k[x] * part[x]


@compiled
def filter_planes(field, weights_y, first_y, weights_x, first_x):
    """Filter every (Y, X) plane along y and x.

    Args:
        field: float32 (Z, Y, X).
        weights_y: float32 (outputs, 2 r_y + 1); first_y: input position of the first output.
        weights_x: float32 (2 r_x + 1, outputs), transposed; first_x: the same for x.

    Returns:
        float32 (Z, outputs_y, outputs_x).
    """
    nz, _, nx = field.shape
    out = np.empty((nz, weights_y.shape[0], weights_x.shape[1]), np.float32)
    lines = np.zeros(nx + weights_x.shape[0], np.float32)
    for z in range(nz):
        _filter_slice(field[z], weights_y, first_y, weights_x, first_x, lines, out[z])
    return out


@compiled
def filter_depth(field, weights, first):
    """Filter along z.

    Args:
        field: float32 (C, Z, Y, X).
        weights: float32 (outputs, 2 r + 1); first: input position of the first output.

    Returns:
        float32 (C, outputs, Y, X).
    """
    nc, nz, ny, nx = field.shape
    radius = weights.shape[1] // 2
    out = np.zeros((nc, weights.shape[0], ny, nx), np.float32)
    for c in range(nc):
        for i in range(weights.shape[0]):
            centre = i + first
            for y in range(ny):
                target = out[c, i, y]
                for z in range(max(0, centre - radius), min(nz, centre + radius + 1)):
                    weight = weights[i, z - centre + radius]
                    row = field[c, z, y]
                    for x in range(nx):
                        target[x] += weight * row[x]
    return out


@compiled
def filter_product_planes(slope, weights_y, first_y, weights_x, first_x):
    """`filter_planes` of every product slope[i] * slope[j], i <= j, made plane by plane.

    Args:
        slope: float32 (D, Z, Y, X), D = 2 or 3.
        weights_y, first_y, weights_x, first_x: as above.

    Returns:
        float32 (D (D + 1) / 2, Z, outputs_y, outputs_x).
    """
    nd, nz, ny, nx = slope.shape
    out = np.empty((nd * (nd + 1) // 2, nz, weights_y.shape[0], weights_x.shape[1]), np.float32)
    lines = np.zeros(nx + weights_x.shape[0], np.float32)
    plane = np.empty((ny, nx), np.float32)
    for z in range(nz):
        pair = 0
        for i in range(nd):
            for j in range(i, nd):
                for y in range(ny):
                    left = slope[i, z, y]
                    right = slope[j, z, y]
                    row = plane[y]
                    for x in range(nx):
                        row[x] = left[x] * right[x]
                _filter_slice(plane, weights_y, first_y, weights_x, first_x, lines, out[pair, z])
                pair += 1
    return out


@compiled
def regress_lines(field, inside, kernel):
    """Local linear regression along the middle axis: reproduces ramps up to the border of any volume.

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
                    share = weight if inside[a, m, b] else np.float32(0)
                    first = share * step
                    moments[0, b] += share
                    moments[1, b] += first
                    moments[2, b] += first * step
                    moments[3, b] += share * field[a, m, b]
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
def central_differences(field, starts, stops, inverse):
    """Gradient of a part of the field: central differences, one-sided at the ends of the array.

    Args:
        field: float32 (Z, Y, X).
        starts, stops: int64 (3,), the part to compute.
        inverse: float32 (3,), 1 / spacing; axes of one voxel have gradient 0.

    Returns:
        float32 (3, *part), order (z, y, x).
    """
    nz, ny, nx = field.shape
    depth, height, width = stops[0] - starts[0], stops[1] - starts[1], stops[2] - starts[2]
    out = np.zeros((3, depth, height, width), np.float32)
    half = np.float32(0.5)
    one = np.float32(1)
    x0 = starts[2]
    for k in range(depth):
        z = k + starts[0]
        above, below = max(z - 1, 0), min(z + 1, nz - 1)
        scale_z = inverse[0] * (half if below - above == 2 else one)
        for j in range(height):
            y = j + starts[1]
            north, south = max(y - 1, 0), min(y + 1, ny - 1)
            scale_y = inverse[1] * (half if south - north == 2 else one)
            upper, lower = field[below, y], field[above, y]
            front, back = field[z, south], field[z, north]
            for i in range(width):
                out[0, k, j, i] = (upper[i + x0] - lower[i + x0]) * scale_z
            for i in range(width):
                out[1, k, j, i] = (front[i + x0] - back[i + x0]) * scale_y
            row = field[z, y]
            target = out[2, k, j]
            scale_x = inverse[2] * half
            for i in range(max(0, 1 - x0), min(width, nx - 1 - x0)):
                target[i] = (row[i + x0 + 1] - row[i + x0 - 1]) * scale_x
            if x0 == 0 and nx > 1:
                target[0] = (row[1] - row[0]) * inverse[2]
            if stops[2] == nx and nx > 1:
                target[width - 1] = (row[nx - 1] - row[nx - 2]) * inverse[2]
    return out


@compiled
def unit_vectors(slope, valid, minimum):
    """Divide vectors by their norm and reverse their components.

    Args:
        slope: float32 (D, N), order (z, y, x).
        valid: bool (N,), set to False where the norm is below `minimum`; vectors are 0 where it is False.
        minimum: see above.

    Returns:
        float32 (D, N), order (x, y, z).
    """
    nd, count = slope.shape
    out = np.empty((nd, count), np.float32)
    one = np.float32(1)
    zero = np.float32(0)
    for i in range(count):
        total = zero
        for d in range(nd):
            total += slope[d, i] * slope[d, i]
        norm = np.sqrt(total)
        good = valid[i] and norm >= minimum
        valid[i] = good
        factor = one / norm if good else zero
        for d in range(nd):
            out[nd - 1 - d, i] = slope[d, i] * factor
    return out


@compiled
def all_within(valid, radius, start, stop):
    """Whether all voxels up to `radius` away along the middle axis are True (those beyond the ends count as
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
    """`all_within` along the last axis of uint8 (A, N)."""
    na, nn = valid.shape
    out = np.empty((na, stop - start), np.uint8)
    bad = np.empty(nn + 1, np.int64)
    for a in range(na):
        bad[0] = 0
        for n in range(nn):
            bad[n + 1] = bad[n] + (1 - valid[a, n])
        for n in range(start, stop):
            out[a, n - start] = bad[min(nn, n + radius + 1)] == bad[max(0, n - radius)]
    return out
