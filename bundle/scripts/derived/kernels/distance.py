"""Compiled loops of the distance transform: minima of parabolas along the lines of one axis.

Squared distances are float32. The value 1e30 means "nothing within reach"; sums of it stay finite. Arrays have three
axes; every function returns the part [start, stop) of the axis along which it works.
"""

from __future__ import annotations

import numpy as np

from volumen.utils.jit import compiled, inlined


@compiled
def nearest_in_row(feature, cost, start, stop):
    """Return the squared distance to the nearest True voxel of the same row.

    Args:
        feature: bool (Z, Y, X).
        cost: float32 (K + 1,), squared distance of a step of 0..K voxels, ascending; farther voxels are ignored.
        start, stop: columns to compute.

    Returns:
        float32 (Z, Y, stop - start).
    """
    nz, ny, nx = feature.shape
    last = cost.size - 1
    out = np.empty((nz, ny, stop - start), np.float32)
    costs = np.full(last + 2, np.float32(1e30))
    costs[: last + 1] = cost
    ahead = np.empty(nx, np.int32)
    for z in range(nz):
        for y in range(ny):
            count = 0
            for x in range(nx):
                count += feature[z, y, x]
            if count == 0 or count == nx:
                out[z, y, :] = np.float32(0) if count else np.float32(1e30)
                continue
            steps = last + 1
            for x in range(nx - 1, -1, -1):
                steps = 0 if feature[z, y, x] else min(steps + 1, last + 1)
                ahead[x] = steps
            steps = last + 1
            for x in range(stop):
                steps = 0 if feature[z, y, x] else min(steps + 1, last + 1)
                if x >= start:
                    out[z, y, x - start] = costs[min(steps, ahead[x])]
    return out


@inlined
def _row(array, along, other, axis):
    """Return one row: its position along axis 0 or 1 (`axis`), and its position along the other of the two."""
    return array[along, other] if axis == 0 else array[other, along]


@inlined
def _result(array, extent, axis):
    """Return an empty float32 array of the same shape except for the extent of axis 0 or 1."""
    nz, ny, nx = array.shape
    shape = (extent, ny, nx) if axis == 0 else (nz, extent, nx)
    return np.empty(shape, np.float32)


@compiled
def nearest_across(squared, cost, start, stop, axis, needed=None):
    """Return the minimum over steps k along axis 0 or 1 of `squared + cost[|k|]`.

    Args:
        squared: float32 (Z, Y, X), squared distances along the axes that are done already.
        cost: float32 (K + 1,), as above, for this axis.
        start, stop: positions to compute.
        axis: 0 or 1.
        needed: bool, shape of the result, where the minimum is needed; a single plane stands for all along axis 0.
            Elsewhere the result may be larger. Default everywhere.

    Returns:
        float32, shape of `squared` with stop - start in place of `axis`.
    """
    length = squared.shape[axis]
    others = squared.shape[1 - axis]
    nb = squared.shape[2]
    reach = cost.size - 1
    out = _result(squared, stop - start, axis)
    empty = np.empty((length, others), np.bool_)
    for n in range(length):
        for a in range(others):
            row = _row(squared, n, a, axis)
            finite = False
            for b in range(nb):
                finite |= row[b] < np.float32(1e30)
            empty[n, a] = not finite
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            n, a = (i + start, j) if axis == 0 else (j + start, i)
            best = out[i, j]
            best[:] = _row(squared, n, a, axis)
            low, high = 0, nb
            if needed is not None:
                wanted = needed[min(i, needed.shape[0] - 1), j]
                while low < nb and not wanted[low]:
                    low += 1
                while high > low and not wanted[high - 1]:
                    high -= 1
                if low == high:
                    continue
            near = best[low:high]
            changed = True
            for k in range(1, reach + 1):
                step = cost[k]
                if changed:
                    # Outwards: no row that is farther than all distances so far changes any.
                    changed = False
                    open_ = False
                    for b in range(near.size):
                        open_ |= near[b] > step
                    if not open_:
                        break
                for m in (n - k, n + k):
                    if m < 0 or m >= length or empty[m, a]:
                        continue
                    changed = True
                    other = _row(squared, m, a, axis)[low:high]
                    for b in range(near.size):
                        value = other[b] + step
                        near[b] = value if value < near[b] else near[b]
    return out


@compiled
def _costs_to_change(row, costs, ahead, out):
    """Compute the squared distance from every entry of a row to the nearest one of another value.

    Args:
        row: integer (X,).
        costs: float32 (K + 2,), of 0..K steps; the last one means "nothing within reach".
        ahead: int32 (X,), overwritten.
        out: float32 (X,), overwritten.
    """
    far = costs.size - 1
    steps = far
    before = row[row.size - 1]
    for x in range(row.size - 1, -1, -1):
        steps = min(steps + 1, far) if row[x] == before else 1
        before = row[x]
        ahead[x] = steps
    steps = far
    before = row[0]
    for x in range(row.size):
        steps = min(steps + 1, far) if row[x] == before else 1
        before = row[x]
        out[x] = costs[min(steps, ahead[x])]


@compiled
def opposite_in_row(kind, cost, start, stop):
    """Return the signed squared distance to the nearest voxel of another kind in the same row.

    Args:
        kind: uint8 (Z, Y, X): 0 background, 1 foreground, 2 opposite to both.
        cost: float32 (K + 1,), as above.
        start, stop: columns to compute.

    Returns:
        float32 (Z, Y, stop - start): positive in the background, negative in the foreground, 0 for kind 2.
    """
    nz, ny, nx = kind.shape
    out = np.empty((nz, ny, stop - start), np.float32)
    costs = np.append(cost, np.float32(1e30))
    sign = np.array([1, -1, 0], np.float32)
    ahead = np.empty(nx, np.int32)
    nearest = np.empty(nx, np.float32)
    for z in range(nz):
        for y in range(ny):
            _costs_to_change(kind[z, y], costs, ahead, nearest)
            for x in range(start, stop):
                out[z, y, x - start] = sign[kind[z, y, x]] * nearest[x]
    return out


@compiled
def opposite_across(signed, cost, start, stop, axis):
    """Compute `nearest_across` for both classes at once.

    For a voxel of one class, a voxel of the other is at distance 0, and one of the same class stands for its own line:
    for background the value at q is max(signed(q), 0), for foreground max(-signed(q), 0). So one pass
    computes the distances inside and outside.

    Args:
        signed: float32 (Z, Y, X), the result of `opposite_in_row`.
        cost: float32 (K + 1,), as above, for this axis.
        start, stop: positions to compute.
        axis: 0 or 1.

    Returns:
        float32, shape of `signed` with stop - start in place of `axis`, signed in the same way.
    """
    length = signed.shape[axis]
    others = signed.shape[1 - axis]
    nb = signed.shape[2]
    reach = cost.size - 1
    zero = np.float32(0)
    one = np.float32(1)
    out = _result(signed, stop - start, axis)
    side = np.empty(nb, np.float32)
    best = np.empty(nb, np.float32)
    for a in range(others):
        for n in range(start, stop):
            own = _row(signed, n, a, axis)
            for b in range(nb):
                side[b] = -one if own[b] < zero else one
                best[b] = abs(own[b])
            for m in range(max(0, n - reach), min(length, n + reach + 1)):
                step = cost[abs(m - n)]
                other = _row(signed, m, a, axis)
                for b in range(nb):
                    value = side[b] * other[b]
                    value = (value if value > zero else zero) + step
                    best[b] = value if value < best[b] else best[b]
            target = _row(out, n - start, a, axis)
            for b in range(nb):
                target[b] = side[b] * best[b]
    return out


@compiled
def differing_in_row(numbers, cost, start, stop):
    """Return the squared distance to the nearest voxel of another number in the same row.

    Args:
        numbers: int32 (Z, Y, X); a negative number differs from every number, also from itself.
        cost: float32 (K + 1,), as above.
        start, stop: columns to compute.

    Returns:
        float32 (Z, Y, stop - start); 0 for negative numbers.
    """
    nz, ny, nx = numbers.shape
    out = np.empty((nz, ny, stop - start), np.float32)
    costs = np.append(cost, np.float32(1e30))
    ahead = np.empty(nx, np.int32)
    nearest = np.empty(nx, np.float32)
    for z in range(nz):
        for y in range(ny):
            _costs_to_change(numbers[z, y], costs, ahead, nearest)
            for x in range(start, stop):
                out[z, y, x - start] = np.float32(0) if numbers[z, y, x] < 0 else nearest[x]
    return out


@compiled
def differing_across(squared, numbers, cost, start, stop, axis):
    """Continue `differing_in_row` along axis 0 or 1: a voxel of another number is at distance 0, one of the same
    number stands for its own line.

    Args:
        squared: float32 (Z, Y, X), the result of `differing_in_row` or of this function for the other axis.
        numbers: int32, same shape.
        cost: float32 (K + 1,), as above, for this axis.
        start, stop: positions to compute.
        axis: 0 or 1.

    Returns:
        float32, shape of `squared` with stop - start in place of `axis`.
    """
    length = squared.shape[axis]
    others = squared.shape[1 - axis]
    nb = squared.shape[2]
    reach = cost.size - 1
    zero = np.float32(0)
    out = _result(squared, stop - start, axis)
    for a in range(others):
        for n in range(start, stop):
            best = _row(out, n - start, a, axis)
            own = _row(numbers, n, a, axis)
            best[:] = _row(squared, n, a, axis)
            for m in range(max(0, n - reach), min(length, n + reach + 1)):
                step = cost[abs(m - n)]
                other = _row(squared, m, a, axis)
                theirs = _row(numbers, m, a, axis)
                for b in range(nb):
                    value = (other[b] if theirs[b] == own[b] else zero) + step
                    best[b] = value if value < best[b] else best[b]
    return out


@compiled
def signed_root(signed, half, cut):
    """Compute, in place, sign(s) * min(sqrt(|s|) - half, cut) for a C-contiguous float32 array of any shape
    (flattened)."""
    for i in range(signed.size):
        value = np.sqrt(abs(signed[i])) - half
        value = value if value < cut else cut
        signed[i] = -value if signed[i] < np.float32(0) else value


@compiled
def bounds_of_roots(unknown, other, foreground, known, half, cut, lower, certain):
    """Turn squared distances into bounds of the signed distance, with the arithmetic of `signed_root`.

    Args:
        unknown: float32 (N,), squared distance to the nearest unknown voxel, overwritten with the distance.
        other: float32 (N,), squared distance to the nearest other voxel, overwritten with the upper bound.
        foreground: bool (N,): the distance is negative there, so that the bounds change places.
        known: bool (N,): both are 0 where it is False.
        half, cut: see `signed_root`.
        lower: float32 (N,), overwritten with the lower bound.
        certain: bool (N,), overwritten: no unknown voxel is as near as the nearest other one, or as the reach.
    """
    limit = (cut + half) * (cut + half)
    for i in range(other.size):
        near = other[i] if other[i] < unknown[i] else unknown[i]
        certain[i] = known[i] and (other[i] < unknown[i] or near >= limit)
        low = np.sqrt(near) - half
        high = np.sqrt(other[i]) - half
        clearance = np.sqrt(unknown[i]) - half
        low = low if low < cut else cut
        high = high if high < cut else cut
        unknown[i] = clearance if clearance < cut else cut
        low = low if known[i] else np.float32(0)
        high = high if known[i] else np.float32(0)
        lower[i] = -high if foreground[i] else low
        other[i] = -low if foreground[i] else high


@compiled
def nearest_offsets(feature, cost_z, cost_y, cost_x):
    """Return the steps to the nearest True voxel, by the distances of `nearest_in_row` and `nearest_across`.

    Of equally near voxels, the one with the smallest z, then y, then x counts, wherever the array was cropped.

    Args:
        feature: bool (Z, Y, X).
        cost_z, cost_y, cost_x: float32 (K + 1,), squared distance of a step of 0..K voxels along an axis.

    Returns:
        int16 (3, Z, Y, X), steps along (z, y, x); 0 where no True voxel lies within reach.
    """
    nz, ny, nx = feature.shape
    far = np.float32(1e30)
    steps = np.zeros((3, nz, ny, nx), np.int16)
    squared = np.full((nz, ny, nx), far)
    last = cost_x.size - 1
    for z in range(nz):
        for y in range(ny):
            gone = last + 1
            for x in range(nx):
                gone = 0 if feature[z, y, x] else gone + 1
                if gone <= last:
                    squared[z, y, x] = cost_x[gone]
                    steps[2, z, y, x] = -gone
            gone = last + 1
            for x in range(nx - 1, -1, -1):
                gone = 0 if feature[z, y, x] else gone + 1
                if gone <= last and cost_x[gone] < squared[z, y, x]:
                    squared[z, y, x] = cost_x[gone]
                    steps[2, z, y, x] = gone
    reach = cost_y.size - 1
    within = squared.copy()
    rows = steps[2].copy()
    for z in range(nz):
        for y in range(ny):
            squared[z, y, :] = far
            for m in range(max(0, y - reach), min(ny, y + reach + 1)):
                step = cost_y[abs(m - y)]
                for x in range(nx):
                    value = within[z, m, x] + step
                    if value < squared[z, y, x]:
                        squared[z, y, x] = value
                        steps[1, z, y, x] = m - y
                        steps[2, z, y, x] = rows[z, m, x]
    reach = cost_z.size - 1
    within = squared.copy()
    planes = steps.copy()
    for z in range(nz):
        for y in range(ny):
            squared[z, y, :] = far
            for m in range(max(0, z - reach), min(nz, z + reach + 1)):
                step = cost_z[abs(m - z)]
                for x in range(nx):
                    value = within[m, y, x] + step
                    if value < squared[z, y, x]:
                        squared[z, y, x] = value
                        steps[0, z, y, x] = m - z
                        steps[1, z, y, x] = planes[1, m, y, x]
                        steps[2, z, y, x] = planes[2, m, y, x]
    return steps
