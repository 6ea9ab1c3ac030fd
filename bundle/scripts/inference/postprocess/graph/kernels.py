"""Compiled loops over voxels: peaks, descent to the nearest bottom, numbering of pieces.

Arrays have three axes. Every voxel has a step to its parent: 0 to 26, of which 13 means that it is a bottom, or `NONE`.
Step s leads by (s // 9 - 1, s // 3 % 3 - 1, s % 3 - 1) voxels. A step depends on voxels of bounded distance alone, and
ties are broken by the order of voxels in the volume; so it is the same in whatever block it is computed.
"""

from __future__ import annotations

import numpy as np

from volumen.utils.jit import compiled

BOTTOM = 13
NONE = 255
"""The step of a voxel without an instance."""


@compiled
def find_peaks(free, depth, region, peak):
    """Write which free voxels of a region are peaks: no free neighbour, of corners too, is deeper.

    A neighbour across an edge or a corner counts if all voxels between are free, so that no wall is crossed and every
    free component has a peak. Of equal depths the voxel that comes first in the volume is the deeper one.

    Args:
        free: bool (Z, Y, X).
        depth: float32 (Z, Y, X).
        region: int64 (3, 2), start and stop per axis.
        peak: bool (Z, Y, X), False; overwritten in the region.
    """
    nz, ny, nx = free.shape
    for z in range(region[0, 0], region[0, 1]):
        for y in range(region[1, 0], region[1, 1]):
            for x in range(region[2, 0], region[2, 1]):
                if free[z, y, x]:
                    peak[z, y, x] = not _has_deeper(free, depth, z, y, x, nz, ny, nx)


@compiled
def _has_deeper(free, depth, z, y, x, nz, ny, nx):
    own = depth[z, y, x]
    for dz in range(-1, 2):
        a = z + dz
        if a < 0 or a >= nz:
            continue
        for dy in range(-1, 2):
            b = y + dy
            if b < 0 or b >= ny:
                continue
            for dx in range(-1, 2):
                c = x + dx
                if c < 0 or c >= nx or not free[a, b, c]:
                    continue
                value = depth[a, b, c]
                if value < own or (value == own and dz * 9 + dy * 3 + dx >= 0):
                    continue
                if (
                    free[a, y, x]
                    and free[z, b, x]
                    and free[z, y, c]
                    and free[a, b, x]
                    and free[a, y, c]
                    and free[z, b, c]
                ):
                    return True
    return False


@compiled
def descend(inside, height, links, region, step):
    """Write the step of every voxel of a region to a lower neighbour across a face.

    It is the lowest neighbour without a wall between. Of equal heights the voxel that comes first in the volume is the
    lower one.

    Args:
        inside: bool (Z, Y, X), voxels that instances may contain.
        height: uint16 (Z, Y, X).
        links: uint16 (3, Z, Y, X), the wall between a voxel and the previous one on each axis, or of shape
            (0, 0, 0, 0).
        region: int64 (3, 2), start and stop per axis.
        step: uint8 (Z, Y, X), overwritten in the region: `NONE` where a voxel is not inside.
    """
    nz, ny, nx = inside.shape
    for z in range(region[0, 0], region[0, 1]):
        for y in range(region[1, 0], region[1, 1]):
            for x in range(region[2, 0], region[2, 1]):
                if not inside[z, y, x]:
                    step[z, y, x] = NONE
                    continue
                own = np.int64(height[z, y, x])
                chosen, lowest = BOTTOM, np.int64(1 << 62)
                for side in range(6):
                    axis = side if side < 3 else 5 - side
                    way = -1 if side < 3 else 1
                    a, b, c = z + way * (axis == 0), y + way * (axis == 1), x + way * (axis == 2)
                    if a < 0 or b < 0 or c < 0 or a >= nz or b >= ny or c >= nx or not inside[a, b, c]:
                        continue
                    value = np.int64(height[a, b, c])
                    if value > own or (value == own and way > 0):
                        continue
                    if links.shape[0] and links[axis, max(z, a), max(y, b), max(x, c)] > 0:
                        continue
                    if value < lowest:
                        lowest = value
                        chosen = (a - z + 1) * 9 + (b - y + 1) * 3 + c - x + 1
                step[z, y, x] = chosen


@compiled
def count_ends(step, region):
    """Return how many voxels of a region are bottoms, or step out of it."""
    count = 0
    for z in range(region[0, 0], region[0, 1]):
        for y in range(region[1, 0], region[1, 1]):
            for x in range(region[2, 0], region[2, 1]):
                code = step[z, y, x]
                if code == NONE:
                    continue
                a, b, c = z + code // 9 - 1, y + code // 3 % 3 - 1, x + code % 3 - 1
                out = (
                    a < region[0, 0]
                    or a >= region[0, 1]
                    or b < region[1, 0]
                    or b >= region[1, 1]
                    or c < region[2, 0]
                    or c >= region[2, 1]
                )
                count += code == BOTTOM or out
    return count


@compiled
def number_pieces(step, peak, height, region, shape, first, labels, ends, sizes, lowest, seeds):
    """Number the pieces of a region from 1: the voxels whose steps lead to the same end.

    Args:
        step: uint8 (Z, Y, X).
        peak: bool (Z, Y, X), see `find_peaks`.
        height: uint16 (Z, Y, X).
        region: int64 (3, 2), start and stop per axis.
        shape: int64 (3,), of the volume.
        first: int64 (3,), place of the arrays in the volume.
        labels: uint32, shape of the region, zeros; overwritten by the numbers.
        ends: int64 (pieces, 2), overwritten: index in the volume of the bottom, or of the voxel outside the region to
            which the piece's last step leads; 1 for a bottom.
        sizes: int64 (pieces,), zeros; overwritten by the voxels of each piece.
        lowest: int64 (pieces,), overwritten by the lowest height of each piece.
        seeds: int64 (pieces,), zeros; overwritten by the peaks in each piece.
    """
    z0, y0, x0 = region[0, 0], region[1, 0], region[2, 0]
    nz, ny, nx = labels.shape
    lowest[:] = 1 << 17
    count = 0
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                code = step[z + z0, y + y0, x + x0]
                if code == NONE:
                    continue
                a, b, c = z + code // 9 - 1, y + code // 3 % 3 - 1, x + code % 3 - 1
                if code == BOTTOM or a < 0 or a >= nz or b < 0 or b >= ny or c < 0 or c >= nx:
                    place = (
                        ((a + z0 + first[0]) * shape[1] + b + y0 + first[1]) * shape[2] + c + x0 + first[2]
                    )
                    ends[count, 0], ends[count, 1] = place, code == BOTTOM
                    count += 1
                    labels[z, y, x] = count
    path = np.empty((64, 3), np.int32)
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if step[z + z0, y + y0, x + x0] == NONE:
                    continue
                a, b, c = z, y, x
                length = 0
                while labels[a, b, c] == 0:
                    if length == len(path):
                        longer = np.empty((2 * length, 3), np.int32)
                        longer[:length] = path
                        path = longer
                    path[length, 0], path[length, 1], path[length, 2] = a, b, c
                    length += 1
                    code = step[a + z0, b + y0, c + x0]
                    a, b, c = a + code // 9 - 1, b + code // 3 % 3 - 1, c + code % 3 - 1
                number = labels[a, b, c]
                for i in range(length):
                    labels[path[i, 0], path[i, 1], path[i, 2]] = number
                sizes[number - 1] += 1
                seeds[number - 1] += peak[z + z0, y + y0, x + x0]
                value = np.int64(height[z + z0, y + y0, x + x0])
                if value < lowest[number - 1]:
                    lowest[number - 1] = value
