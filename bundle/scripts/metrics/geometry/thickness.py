"""Local thickness of structures and of the gaps between them.

The local thickness at a voxel is the diameter of the largest ball that lies within the structure and holds the voxel
(Hildebrand and Rueegsegger, "A new method for the model-independent assessment of thickness in three-dimensional
images", 1997). Balls are centred on voxels; only those that no ball of a neighbour holds are drawn (the distance
ridge: Dougherty and Kunzelmann, "Computing local thickness of 3D structures with ImageJ", 2007).

A ball around a voxel ends at the centre of the nearest voxel outside, at distance D. What lies between the two faces is
between 2 D - h and 2 D thick, h being the distance of voxel planes across its direction; how thick it is between these
is found by going from the centre the other way. Slabs of any number of voxels so have their thickness exactly.
"""

from __future__ import annotations

import numpy as np

from volumen.metrics.geometry.distances import squared_to_other
from volumen.metrics.geometry.scale import Scale, ball, squared_norms
from volumen.metrics.grid import Region
from volumen.utils.jit import compiled


@compiled
def _is_centre(numbers, squared, z, y, x, needed, norms, limit):
    """Whether no neighbour's ball holds the ball of a voxel; beyond the limit, whether a face neighbour is below."""
    nz, ny, nx = numbers.shape
    own = squared[z, y, x]
    if own > limit:
        for axis in range(3):
            for side in (-1, 1):
                a = z + side * (axis == 0)
                b = y + side * (axis == 1)
                c = x + side * (axis == 2)
                if 0 <= a < nz and 0 <= b < ny and 0 <= c < nx and squared[a, b, c] <= limit:
                    return True
        return False
    row = np.searchsorted(norms, own)
    for a in range(max(z - 1, 0), min(z + 2, nz)):
        for b in range(max(y - 1, 0), min(y + 2, ny)):
            for c in range(max(x - 1, 0), min(x + 2, nx)):
                if (a == z and b == y and c == x) or numbers[a, b, c] != numbers[z, y, x]:
                    continue
                kind = 4 * (a != z) + 2 * (b != y) + (c != x)
                theirs = squared[a, b, c]
                least = needed[kind, row]
                if (theirs > limit and least <= limit) or (theirs <= limit and theirs > least):
                    return False
    return True


@compiled
def _thickness_at(numbers, z, y, x, own, offsets, norms, step):
    """Return the thickness through the centre of a ball, of squared radius `own`."""
    nz, ny, nx = numbers.shape
    radius = np.sqrt(own)
    for j in range(np.searchsorted(norms, own), len(offsets)):
        a, b, c = z + offsets[j, 0], y + offsets[j, 1], x + offsets[j, 2]
        if not (0 <= a < nz and 0 <= b < ny and 0 <= c < nx) or numbers[a, b, c] == numbers[z, y, x]:
            continue
        # From here to the nearest voxel outside, and the other way from the centre.
        dz, dy, dx = offsets[j, 0] * step[0], offsets[j, 1] * step[1], offsets[j, 2] * step[2]
        length = np.sqrt(dz * dz + dy * dy + dx * dx)
        planes = length / (abs(offsets[j, 0]) + abs(offsets[j, 1]) + abs(offsets[j, 2]))
        uz, uy, ux = -offsets[j, 0] / length, -offsets[j, 1] / length, -offsets[j, 2] / length
        count = int(np.ceil((radius + planes) / planes * 4))
        for k in range(count):
            at = (k + 0.5) * planes / 4
            a = int(np.floor(z + at * uz + 0.5))
            b = int(np.floor(y + at * uy + 0.5))
            c = int(np.floor(x + at * ux + 0.5))
            if not (0 <= a < nz and 0 <= b < ny and 0 <= c < nx):
                return 2 * radius - planes
            if numbers[a, b, c] != numbers[z, y, x]:
                through = radius - planes / 2 + k * planes / 4
                return min(max(through, 2 * radius - planes), 2 * radius)
        return 2 * radius
    return 2 * radius


@compiled
def _draw(out, z, y, x, own, value, cost_z, cost_y, cost_x):
    """Raise the thickness within an open ball, of squared lengths below `own`."""
    nz, ny, nx = out.shape
    top = len(cost_x) - 1
    for i in range(len(cost_z)):
        if cost_z[i] >= own:
            break
        k = top
        for j in range(len(cost_y)):
            # The half length of a row shrinks with its distance from the centre.
            while k >= 0 and (cost_x[k] + cost_y[j]) + cost_z[i] >= own:
                k -= 1
            if k < 0:
                break
            if j == 0:
                top = k
            first, end = max(x - k, 0), min(x + k + 1, nx)
            for side in range(4):
                a = z + i if side & 1 else z - i
                b = y + j if side & 2 else y - j
                if (side & 1 and i == 0) or (side & 2 and j == 0) or not (0 <= a < nz and 0 <= b < ny):
                    continue
                row = out[a, b, first:end]
                for n in range(row.size):
                    row[n] = value if value > row[n] else row[n]


@compiled
def _thickness(numbers, squared, needed, offsets, norms, limit, costs, step, most, low, high):
    nz, ny, nx = numbers.shape
    cost_z, cost_y, cost_x = costs
    # The least number above the limit: an open ball below it is the closed one of the limit.
    beyond = np.nextafter(limit, np.float32(np.inf))
    out = np.zeros((nz, ny, nx), np.float32)
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            for x in range(low[2], high[2]):
                own = squared[z, y, x]
                if own > limit:
                    out[z, y, x] = most
                if not _is_centre(numbers, squared, z, y, x, needed, norms, limit):
                    continue
                if own > limit:
                    _draw(out, z, y, x, beyond, most, cost_z, cost_y, cost_x)
                    continue
                value = np.float32(_thickness_at(numbers, z, y, x, own, offsets, norms, step))
                _draw(out, z, y, x, own, value, cost_z, cost_y, cost_x)
    return out


def _needed(offsets: np.ndarray, norms: np.ndarray, scale: Scale) -> np.ndarray:
    """Return what a neighbour's squared distance must exceed for its ball to hold that of a voxel.

    Returns:
        float32 (8, n + 1): by the axes along which the neighbour lies (4 z + 2 y + x), and by the number of offsets
        that are nearer than the voxel's distance.
    """
    wide = [
        (np.arange(len(cost) + 1) * size).astype(np.float32) ** 2
        for cost, size in zip(scale.costs(scale.radius), scale.step, strict=True)
    ]
    rows = []
    for kind in range(8):
        along = np.array([kind >> 2 & 1, kind >> 1 & 1, kind & 1])
        farthest = squared_norms(wide, np.abs(offsets) + along)
        rows.append(np.concatenate([[0], np.maximum.accumulate(farthest)]).astype(np.float32))
    return np.stack(rows)


def local_thickness(numbers: np.ndarray, scale: Scale, within: Region | None = None) -> np.ndarray:
    """Return the local thickness of the structure that each voxel belongs to, the background being one as well.

    Args:
        numbers: int32 (Z, Y, X), the structure of each voxel, none negative. The array's border ends none.
        scale: voxel sizes.
        within: the part where the result is needed; elsewhere it may be too small. None: everywhere.

    Returns:
        float32 (Z, Y, X), in the spacing's unit; twice the largest ball's radius where it is at least that.
    """
    squared = squared_to_other(numbers, scale, scale.radius)
    costs = scale.costs(scale.radius)
    offsets, norms = ball(costs, scale.radius)
    needed = _needed(offsets, norms, scale)
    step = np.array(scale.step)
    most = np.float32(2 * scale.radius)
    part = within or tuple(slice(0, n) for n in numbers.shape)
    reach = [width + 1 for width in scale.voxels(scale.radius)]
    low = np.array([max(side.start - width, 0) for side, width in zip(part, reach, strict=True)])
    high = np.array(
        [min(side.stop + width, n) for side, width, n in zip(part, reach, numbers.shape, strict=True)]
    )
    return np.asarray(
        _thickness(numbers, squared, needed, offsets, norms, norms[-1], tuple(costs), step, most, low, high)
    )
