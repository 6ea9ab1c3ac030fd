"""Compiled loops over voxels: ascent to the nearest peak, growth into walls, numbering of pieces.

Arrays have three axes. Every voxel has a step to its parent: 0 to 26, of which 13 means that it is a peak, or `NONE`.
Step s leads by (s // 9 - 1, s // 3 % 3 - 1, s % 3 - 1) voxels. A step depends on voxels of bounded distance alone, and
ties are broken by the order of voxels in the volume; so it is the same in whatever block it is computed.
"""

from __future__ import annotations

import numpy as np

from volumen.utils.jit import compiled, inlined

PEAK = 13
NONE = 255
"""The step of a voxel without an instance."""
UNREACHED = 255
"""The round of a voxel that no fragment has reached."""


@compiled
def ascend(free, height, region, step):
    """Write the step of every free voxel of a region to the highest of its free neighbours, of corners too.

    A step across an edge or a corner needs all voxels between to be free, so that no step crosses a thin wall. Of equal
    heights the voxel that comes first in the volume is the higher one.

    Args:
        free: bool (Z, Y, X).
        height: float32 (Z, Y, X).
        region: int64 (3, 2), start and stop per axis.
        step: uint8 (Z, Y, X), overwritten in the region: `NONE` where a voxel is not free.
    """
    nz, ny, nx = free.shape
    for z in range(region[0, 0], region[0, 1]):
        for y in range(region[1, 0], region[1, 1]):
            for x in range(region[2, 0], region[2, 1]):
                if not free[z, y, x]:
                    step[z, y, x] = NONE
                    continue
                best = height[z, y, x]
                chosen = PEAK
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
                            code = (dz + 1) * 9 + (dy + 1) * 3 + dx + 1
                            value = height[a, b, c]
                            if value < best or (value == best and code >= chosen):
                                continue
                            if (
                                free[a, y, x]
                                and free[z, b, x]
                                and free[z, y, c]
                                and free[a, b, x]
                                and free[a, y, c]
                                and free[z, b, c]
                            ):
                                best = value
                                chosen = code
                step[z, y, x] = chosen


@inlined
def _cost(wall, links, axis, z, y, x, a, b, c):
    """Return the wall of the step from (z, y, x) to its neighbour (a, b, c) on an axis."""
    if links.shape[0] == 0:
        return np.int64(wall[a, b, c])
    return np.int64(links[axis, max(z, a), max(y, b), max(x, c)])


@compiled
def grow(free, inside, wall, links, levels, reached, step):
    """Write the step of every voxel in a wall to the neighbour across a face from which a fragment reaches it.

    In each round, fragments grow by one voxel into walls up to a level. A voxel steps to the neighbour with the lowest
    wall, of those that were reached in an earlier round.

    Args:
        free: bool (Z, Y, X), voxels that belong to a fragment from the start.
        inside: bool (Z, Y, X), voxels into which fragments may grow.
        wall: uint16 (Z, Y, X).
        links: uint16 (3, Z, Y, X), the wall between a voxel and the previous one on each axis, which then decides; or
            of shape (0, 0, 0, 0).
        levels: uint16 (rounds,), the highest wall that each round enters.
        reached: uint8 (Z, Y, X), overwritten: the round in which a voxel was reached, or `UNREACHED`.
        step: uint8 (Z, Y, X), overwritten where a fragment grows.
    """
    nz, ny, nx = free.shape
    count = 0
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                reached[z, y, x] = 0 if free[z, y, x] else UNREACHED
                count += inside[z, y, x] and not free[z, y, x]
    todo = np.empty((count, 3), np.int32)
    count = 0
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if inside[z, y, x] and not free[z, y, x]:
                    todo[count, 0], todo[count, 1], todo[count, 2] = z, y, x
                    count += 1
    for number in range(levels.size):
        left = 0
        for i in range(count):
            z, y, x = todo[i, 0], todo[i, 1], todo[i, 2]
            chosen = NONE
            if links.shape[0] or wall[z, y, x] <= levels[number]:
                lowest = np.int64(1 << 17)
                for side in range(6):
                    axis = side if side < 3 else 5 - side
                    way = -1 if side < 3 else 1
                    a, b, c = z + way * (axis == 0), y + way * (axis == 1), x + way * (axis == 2)
                    if a < 0 or b < 0 or c < 0 or a >= nz or b >= ny or c >= nx or reached[a, b, c] > number:
                        continue
                    cost = _cost(wall, links, axis, z, y, x, a, b, c)
                    if cost < lowest and (links.shape[0] == 0 or cost <= levels[number]):
                        lowest = cost
                        chosen = (a - z + 1) * 9 + (b - y + 1) * 3 + c - x + 1
            if chosen == NONE:
                todo[left, 0], todo[left, 1], todo[left, 2] = z, y, x
                left += 1
            else:
                step[z, y, x] = chosen
                reached[z, y, x] = number + 1
        count = left


@compiled
def count_ends(step, region):
    """Return how many voxels of a region are peaks, or step out of it."""
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
                count += code == PEAK or out
    return count


@compiled
def number_pieces(step, basin, region, shape, first, labels, ends, sizes, lowest):
    """Number the pieces of a region from 1: the voxels whose steps lead to the same end.

    Args:
        step: uint8 (Z, Y, X).
        basin: uint16 (Z, Y, X), how shallow voxels lie.
        region: int64 (3, 2), start and stop per axis.
        shape: int64 (3,), of the volume.
        first: int64 (3,), place of the arrays in the volume.
        labels: uint32, shape of the region, zeros; overwritten by the numbers.
        ends: int64 (pieces, 2), overwritten: index in the volume of the peak, or of the voxel outside the region to
            which the piece's last step leads; 1 for a peak.
        sizes: int64 (pieces,), zeros; overwritten by the voxels of each piece.
        lowest: int64 (pieces,), overwritten by the lowest value of the basin in each piece.
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
                if code == PEAK or a < 0 or a >= nz or b < 0 or b >= ny or c < 0 or c >= nx:
                    place = (
                        ((a + z0 + first[0]) * shape[1] + b + y0 + first[1]) * shape[2] + c + x0 + first[2]
                    )
                    ends[count, 0], ends[count, 1] = place, code == PEAK
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
                value = np.int64(basin[z + z0, y + y0, x + x0])
                if value < lowest[number - 1]:
                    lowest[number - 1] = value
