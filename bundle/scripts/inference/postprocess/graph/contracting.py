"""Joins the pieces of a block that a flooding of the volume joins in any case, whatever lies in other blocks.

Where all neighbours of a piece without a seed lie in the block, the lowest pass out of it belongs to the minimum
spanning forest by which fragments are flooded (Boruvka 1926), so that both sides of the pass end in one region. What is
left are the pieces with seeds and those at the faces towards other blocks.
"""

from __future__ import annotations

import numpy as np

from volumen.inference.postprocess.graph.passes import FACE_BITS, NO_PASS
from volumen.utils.jit import compiled


def roots_of(
    labels: np.ndarray,
    height: np.ndarray,
    links: np.ndarray,
    region: np.ndarray,
    first: np.ndarray,
    shape: np.ndarray,
    seeds: np.ndarray,
) -> np.ndarray:
    """Return to which piece each piece is joined, uint32 (pieces + 1,), itself for none; the place 0 means no piece.

    At most one piece of those that are joined has a seed or lies at a face towards another block; if there is one, it
    is the root.

    Args:
        labels: uint32 (Z, Y, X), the pieces of a block.
        height: uint16, the block and its surroundings.
        links: see `kernels.descend`.
        region: int64 (3, 2), the block as a part of its surroundings.
        first: int64 (3,), place of the surroundings in the volume.
        shape: int64 (3,), of the volume.
        seeds: int64 (pieces,), peaks in each piece.
    """
    bound = np.concatenate([[True], seeds > 0])
    for axis in range(3):
        bounds = region[axis] + first[axis]
        for place, is_open in ((0, bounds[0] > 0), (-1, bounds[1] < shape[axis])):
            if is_open:
                bound[np.take(labels, place, axis)] = True
    root = np.arange(len(bound), dtype=np.uint32)
    best, behind = np.empty(len(bound), np.int64), np.zeros(len(bound), np.uint32)
    while True:
        best[:] = NO_PASS
        find_lowest_passes(labels, height, links, region, first, shape, root, bound, best, behind)
        if not join_over_passes(root, bound, best, behind):
            return root


@compiled
def find_lowest_passes(labels, height, links, region, first, shape, root, bound, best, behind):
    """Write the lowest pass out of each root that is not bound, and the root behind it.

    Args:
        labels, height, links, region, first, shape: see `roots_of`.
        root: uint32 (pieces + 1,), flat: a root is its own root.
        bound: bool (pieces + 1,), roots that do not choose.
        best: int64 (pieces + 1,), `NO_PASS`; overwritten.
        behind: uint32 (pieces + 1,), overwritten.
    """
    nz, ny, nx = labels.shape
    z0, y0, x0 = region[0, 0], region[1, 0], region[2, 0]
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                label = labels[z, y, x]
                if label == 0:
                    continue
                for axis in range(3):
                    a, b, c = z + (axis == 0), y + (axis == 1), x + (axis == 2)
                    if a >= nz or b >= ny or c >= nx:
                        continue
                    other = labels[a, b, c]
                    if other == 0 or other == label:
                        continue
                    u, v = root[label], root[other]
                    if u == v or (bound[u] and bound[v]):
                        continue
                    over = max(
                        np.int64(height[z + z0, y + y0, x + x0]), np.int64(height[a + z0, b + y0, c + x0])
                    )
                    if links.shape[0] and links[axis, a + z0, b + y0, c + x0] > 0:
                        over = (1 << 16) + np.int64(links[axis, a + z0, b + y0, c + x0])
                    place = (
                        ((z + z0 + first[0]) * shape[1] + y + y0 + first[1]) * shape[2] + x + x0 + first[2]
                    )
                    over = (over << FACE_BITS) | (3 * place + axis)
                    if not bound[u] and over < best[u]:
                        best[u], behind[u] = over, v
                    if not bound[v] and over < best[v]:
                        best[v], behind[v] = over, u


@compiled
def join_over_passes(root, bound, best, behind):
    """Join each root that is not bound to the one behind its lowest pass; return how many were joined.

    Args:
        root: uint32, flat; flat again afterwards. A bound root stays the root of those that join it.
        bound, best, behind: see `find_lowest_passes`.
    """
    joined = 0
    for number in range(root.size):
        if bound[number] or best[number] == NO_PASS:
            continue
        u, v = root_of(root, number), root_of(root, behind[number])
        if u == v:
            continue
        if bound[u] or (not bound[v] and u < v):
            root[v] = u
        else:
            root[u] = v
        joined += 1
    for number in range(root.size):
        root[number] = root_of(root, number)
        if root[number] != number:
            # Only roots choose.
            best[number] = NO_PASS
            bound[number] = True
    return joined


@compiled
def root_of(root, number):
    """Return the root of a number, and shorten the path to it."""
    end = number
    while root[end] != end:
        end = root[end]
    while root[number] != end:
        following = root[number]
        root[number] = end
        number = following
    return end


@compiled
def relabel(labels, numbers):
    """Replace each label by its number, in place.

    Args:
        labels: uint32 (Z, Y, X).
        numbers: uint32 (pieces + 1,).
    """
    flat = labels.reshape(-1)
    for i in range(flat.size):
        flat[i] = numbers[flat[i]]


def contracted_numbers(root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each piece after the contraction, uint32 (pieces + 1,), and the pieces that are roots.

    Args:
        root: see `roots_of`.
    """
    roots = np.flatnonzero(root[1:] == np.arange(1, len(root))) + 1
    number = np.zeros(len(root), np.uint32)
    number[roots] = np.arange(1, len(roots) + 1)
    return number[root], roots


def least_of(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Return the smallest value of each group, int64 (groups,).

    Args:
        values: int64 (n,).
        group: group of each value, from 0.
        groups: their number.
    """
    least = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(least, group, values)
    return least


def sums_of(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Return the sum of the values of each group, int64 (groups,); see `least_of`."""
    total = np.zeros(groups, np.int64)
    np.add.at(total, group, values)
    return total
