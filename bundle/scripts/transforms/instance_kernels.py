"""Compiled loops of the distance to the nearest voxel of another instance; see `distance_kernels`."""

from __future__ import annotations

import numpy as np

from scripts.transforms.jit import compiled


@compiled
def differing_in_row(numbers, cost, start, stop):
    """Squared distance to the nearest voxel of another number in the same row.

    Args:
        numbers: int32 (Z, Y, X); negative ones differ from all, themselves included.
        cost: float32 (K + 1,), squared distance of a step of 0..K voxels, ascending; nothing lies further.
        start, stop: columns to compute.

    Returns:
        float32 (Z, Y, stop - start); 0 for negative numbers.
    """
    nz, ny, nx = numbers.shape
    last = cost.size - 1
    out = np.empty((nz, ny, stop - start), np.float32)
    costs = np.full(last + 2, np.float32(1e30))
    costs[: last + 1] = cost
    ahead = np.empty(nx, np.int32)
    for z in range(nz):
        for y in range(ny):
            steps = last + 1
            before = numbers[z, y, nx - 1]
            for x in range(nx - 1, -1, -1):
                own = numbers[z, y, x]
                steps = min(steps + 1, last + 1) if own == before else 1
                before = own
                ahead[x] = steps
            steps = last + 1
            before = numbers[z, y, 0]
            for x in range(stop):
                own = numbers[z, y, x]
                steps = min(steps + 1, last + 1) if own == before else 1
                before = own
                if x >= start:
                    out[z, y, x - start] = np.float32(0) if own < 0 else costs[min(steps, ahead[x])]
    return out


@compiled
def differing_across(squared, numbers, cost, start, stop, axis):
    """Carry `differing_in_row` over axis 0 or 1: a voxel of another number is at distance 0, one of the same
    number stands for its own line.

    Args:
        squared: float32 (Z, Y, X), as of `differing_in_row` or of this function for the other axis.
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
    depth, height = (stop - start, others) if axis == 0 else (others, stop - start)
    out = np.empty((depth, height, nb), np.float32)
    for a in range(others):
        for n in range(start, stop):
            best = out[n - start, a] if axis == 0 else out[a, n - start]
            own = numbers[n, a] if axis == 0 else numbers[a, n]
            best[:] = squared[n, a] if axis == 0 else squared[a, n]
            for m in range(max(0, n - reach), min(length, n + reach + 1)):
                step = cost[abs(m - n)]
                other = squared[m, a] if axis == 0 else squared[a, m]
                theirs = numbers[m, a] if axis == 0 else numbers[a, m]
                for b in range(nb):
                    value = (other[b] if theirs[b] == own[b] else zero) + step
                    best[b] = value if value < best[b] else best[b]
    return out
