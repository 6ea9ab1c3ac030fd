"""Compiled loops that sum the statistics of edges between fragments, in a hash table by the pair of fragments.

A table consists of `keys` uint64 (size,), a power of 2, of which a key is the smaller fragment number shifted by 32
bits plus the larger one, 0 for a free place; and `sums` int64 (size, `COLUMNS`).
"""

from __future__ import annotations

import numpy as np

from volumen.inference.postprocess.graph.passes import FACE_BITS, NO_PASS
from volumen.utils.jit import compiled

COUNT, SUM, LOWEST, FAR_COUNT, FAR_SUM = range(5)
COLUMNS = 5


@compiled
def _place(keys, key):
    """Return the place of a key, or the free place at which it belongs."""
    last = np.uint64(keys.size - 1)
    at = ((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)) & last
    while keys[at] != 0 and keys[at] != key:
        at = (at + np.uint64(1)) & last
    return at


@compiled
def _enlarge(keys, sums):
    """Return a table of twice the size with the same content."""
    more_keys = np.zeros(2 * keys.size, np.uint64)
    more_sums = np.zeros((2 * keys.size, COLUMNS), np.int64)
    for i in range(keys.size):
        if keys[i] != 0:
            at = _place(more_keys, keys[i])
            more_keys[at] = keys[i]
            more_sums[at] = sums[i]
    return more_keys, more_sums


@compiled
def sum_faces(labels, wall, height, links, owned, first, shape, keys, sums, used):
    """Add the faces between fragments: for each voxel of a region the faces towards its next voxel on every axis.

    Args:
        labels: uint32 (Z, Y, X), numbers of fragments, 0 for none.
        wall: uint16 (Z, Y, X); of shape (0, 0, 0): faces are not counted, only their passes.
        height: uint16 (Z, Y, X).
        links: uint16 (3, Z, Y, X), the wall between a voxel and the previous one on each axis, or of shape
            (0, 0, 0, 0).
        owned: int64 (3, 2), start and stop of the region per axis.
        first: int64 (3,), place of the labels in the volume.
        shape: int64 (3,), of the volume.
        keys, sums, used: the table, and how many places of it are used.

    Returns:
        keys, sums and used. `COUNT` counts faces, `SUM` is the sum of the walls on both sides, `LOWEST` the lowest
        pass, see `passes`: its height is the higher of both sides, or over a wall between, which is higher than all
        heights, 65536 plus that wall.
    """
    nz, ny, nx = labels.shape
    for z in range(owned[0, 0], owned[0, 1]):
        for y in range(owned[1, 0], owned[1, 1]):
            last_key = np.zeros(3, np.uint64)
            last_at = np.zeros(3, np.uint64)
            for x in range(owned[2, 0], owned[2, 1]):
                u = np.uint64(labels[z, y, x])
                if u == 0:
                    continue
                for axis in range(3):
                    a, b, c = z + (axis == 0), y + (axis == 1), x + (axis == 2)
                    if a >= nz or b >= ny or c >= nx:
                        continue
                    v = np.uint64(labels[a, b, c])
                    if v == 0 or v == u:
                        continue
                    key = (u << np.uint64(32)) | v if u < v else (v << np.uint64(32)) | u
                    if key != last_key[axis]:
                        at = _place(keys, key)
                        if keys[at] == 0:
                            if 2 * used >= keys.size:
                                keys, sums = _enlarge(keys, sums)
                                at = _place(keys, key)
                                last_key[:] = 0
                            keys[at] = key
                            sums[at, LOWEST] = NO_PASS
                            used += 1
                        last_key[axis], last_at[axis] = key, at
                    at = last_at[axis]
                    if wall.shape[0]:
                        sums[at, COUNT] += 1
                        sums[at, SUM] += np.int64(wall[z, y, x]) + np.int64(wall[a, b, c])
                    saddle = max(np.int64(height[z, y, x]), np.int64(height[a, b, c]))
                    if links.shape[0] and links[axis, a, b, c] > 0:
                        saddle = (1 << 16) + np.int64(links[axis, a, b, c])
                    place = ((z + first[0]) * shape[1] + y + first[1]) * shape[2] + x + first[2]
                    sums[at, LOWEST] = min(sums[at, LOWEST], (saddle << FACE_BITS) | (3 * place + axis))
    return keys, sums, used


@compiled
def sum_offset(labels, wall, owned, offset, far, keys, sums, used):
    """Add the pairs of a voxel and the one at an offset that lie in different fragments.

    Args:
        labels: uint32 (Z, Y, X), numbers of fragments, 0 for none.
        wall: uint16, shape of the region: 65535 minus the affinity of the voxel and the one at the offset.
        owned: int64 (3, 2), start and stop of the region per axis.
        offset: int64 (3,).
        far: whether the pair counts as a distant one, else as a face.
        keys, sums, used: the table, and how many places of it are used.

    Returns:
        keys, sums and used; walls are counted twice, as those on both sides of a face are.
    """
    shape = labels.shape
    for z in range(owned[0, 0], owned[0, 1]):
        a = z + offset[0]
        if a < 0 or a >= shape[0]:
            continue
        for y in range(owned[1, 0], owned[1, 1]):
            b = y + offset[1]
            if b < 0 or b >= shape[1]:
                continue
            last_key, last_at = np.uint64(0), np.uint64(0)
            for x in range(owned[2, 0], owned[2, 1]):
                c = x + offset[2]
                if c < 0 or c >= shape[2]:
                    continue
                u, v = np.uint64(labels[z, y, x]), np.uint64(labels[a, b, c])
                if u == 0 or v == 0 or u == v:
                    continue
                key = (u << np.uint64(32)) | v if u < v else (v << np.uint64(32)) | u
                if key != last_key:
                    at = _place(keys, key)
                    if keys[at] == 0:
                        if 2 * used >= keys.size:
                            keys, sums = _enlarge(keys, sums)
                            at = _place(keys, key)
                        keys[at] = key
                        sums[at, LOWEST] = NO_PASS
                        used += 1
                    last_key, last_at = key, at
                value = np.int64(wall[z - owned[0, 0], y - owned[1, 0], x - owned[2, 0]])
                if far:
                    sums[last_at, FAR_COUNT] += 1
                    sums[last_at, FAR_SUM] += 2 * value
                else:
                    sums[last_at, COUNT] += 1
                    sums[last_at, SUM] += 2 * value
    return keys, sums, used
