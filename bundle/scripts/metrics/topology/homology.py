"""Ranks of maps between the homology of masks: which components, tunnels and cavities of two masks are the same.

A mask stands for the union of its closed voxels (neighbourhoods 26/6), homology is that with coefficients 0 and 1.
Cells of all dimensions lie on a grid of twice the resolution: a cell with k odd coordinates has k dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volumen.metrics.topology.components import label_components
from volumen.metrics.topology.counts import betti_numbers
from volumen.utils.connected import roots_of
from volumen.utils.jit import compiled


@compiled
def _closure(mask, out, bit):
    """Set a bit in all cells that touch a voxel of a mask: out is uint8 (2 Z + 1, 2 Y + 1, 2 X + 1)."""
    nz, ny, nx = mask.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if mask[z, y, x]:
                    for a in range(2 * z, 2 * z + 3):
                        for b in range(2 * y, 2 * y + 3):
                            for c in range(2 * x, 2 * x + 3):
                                out[a, b, c] |= bit


@compiled
def _only_neighbour(alive, z, y, x, parity):
    """Return the place of the only living face (parity 1) or coface (parity 0) of a cell; -1 in the first without."""
    count = 0
    found = (-1, -1, -1)
    for axis in range(3):
        at = z if axis == 0 else (y if axis == 1 else x)
        if at % 2 != parity:
            continue
        for step in (-1, 1):
            a = z + step if axis == 0 else z
            b = y + step if axis == 1 else y
            c = x + step if axis == 2 else x
            within = 0 <= a < alive.shape[0] and 0 <= b < alive.shape[1] and 0 <= c < alive.shape[2]
            if within and alive[a, b, c]:
                count += 1
                found = (a, b, c)
    return found if count == 1 else (-1, -1, -1)


@compiled
def _collapse(alive, wave, size):
    """Remove pairs of cells that change no homology, in waves from some cells on.

    A pair is a cell and its only living face, or a cell and its only living coface (Mrozek and Batko 2009). Waves that
    widen evenly leave far fewer cells than paths that run ahead.

    Args:
        alive: uint8 (2 Z + 1, 2 Y + 1, 2 X + 1), changed in place: 0 for a removed cell, 1 for a living one, 2 for a
            living one of the next wave.
        wave: int64, places of the cells in its first entries.
        size: how many they are.
    """
    nz, ny, nx = alive.shape
    while size:
        following = np.empty(max(64, size // 2), np.int64)
        count = 0
        for i in range(size):
            z, y, x = wave[i] // (ny * nx), wave[i] // nx % ny, wave[i] % nx
            if not alive[z, y, x]:
                continue
            alive[z, y, x] = 1
            a, b, c = _only_neighbour(alive, z, y, x, 1)
            if a < 0:
                a, b, c = _only_neighbour(alive, z, y, x, 0)
            if a < 0:
                continue
            alive[z, y, x] = alive[a, b, c] = 0
            for k in range(2):
                p, q, r = (z, y, x) if k == 0 else (a, b, c)
                for axis in range(3):
                    for step in (-1, 1):
                        u = p + step if axis == 0 else p
                        v = q + step if axis == 1 else q
                        w = r + step if axis == 2 else r
                        if 0 <= u < nz and 0 <= v < ny and 0 <= w < nx and alive[u, v, w] == 1:
                            alive[u, v, w] = 2
                            if count == len(following):
                                following = np.concatenate((following, np.empty(count, np.int64)))
                            following[count] = (u * ny + v) * nx + w
                            count += 1
        wave, size = following, count


@compiled
def _reduce(alive):
    """Remove pairs of cells, and a vertex wherever no pair is left; return the removed vertices."""
    nz, ny, nx = alive.shape
    wave = np.empty(1024, np.int64)
    size = 0
    for place in range(nz * ny * nx):
        z, y, x = place // (ny * nx), place // nx % ny, place % nx
        if not alive[z, y, x]:
            continue
        # Cells that have a pair from the start.
        if _only_neighbour(alive, z, y, x, 1)[0] >= 0 or _only_neighbour(alive, z, y, x, 0)[0] >= 0:
            if size == len(wave):
                wave = np.concatenate((wave, np.empty(size, np.int64)))
            wave[size] = place
            size += 1
    _collapse(alive, wave, size)
    vertices = 0
    for z in range(0, nz, 2):
        for y in range(0, ny, 2):
            for x in range(0, nx, 2):
                if not alive[z, y, x]:
                    continue
                vertices += 1
                alive[z, y, x] = 0
                size = 0
                for axis in range(3):
                    for step in (-1, 1):
                        u = z + step if axis == 0 else z
                        v = y + step if axis == 1 else y
                        w = x + step if axis == 2 else x
                        if 0 <= u < nz and 0 <= v < ny and 0 <= w < nx and alive[u, v, w]:
                            wave[size] = (u * ny + v) * nx + w
                            size += 1
                _collapse(alive, wave, size)
    return vertices


def cell_homology(cells: np.ndarray) -> tuple[int, int]:
    """Return the dimensions of the homology of degree 0 and 1 of a set of cells.

    Args:
        cells: bool (2 Z + 1, 2 Y + 1, 2 X + 1), changed in place: the difference of two closed sets of cells, whose
            relative homology it is, or one closed set.
    """
    vertices = int(_reduce(cells.view(np.uint8)))
    rest = np.argwhere(cells)
    dimension = (rest % 2).sum(axis=1)
    edges, faces = rest[dimension == 1], rest[dimension == 2]
    number = {tuple(edge): i for i, edge in enumerate(edges.tolist())}
    return vertices, len(edges) - _rank([_boundary(face, number) for face in faces.tolist()])


def _boundary(face: list[int], number: dict[tuple[int, ...], int]) -> set[int]:
    """Return the numbers of the living edges of a square."""
    found = set()
    for axis in range(3):
        if face[axis] % 2:
            for step in (-1, 1):
                edge = tuple(at + step if i == axis else at for i, at in enumerate(face))
                if edge in number:
                    found.add(number[edge])
    return found


def _rank(columns: list[set[int]]) -> int:
    """Return the rank of a matrix with entries 0 and 1 modulo 2, given as the rows that hold 1 in each column."""
    pivots: dict[int, set[int]] = {}
    for column in columns:
        rest = set(column)
        while rest:
            lowest = min(rest)
            if lowest not in pivots:
                pivots[lowest] = rest
                break
            rest ^= pivots[lowest]
    return len(pivots)


@dataclass(frozen=True)
class MatchedFeatures:
    """Components, tunnels and cavities of two masks.

    Args:
        matched: how many of each the masks have in common.
        pred: how many the prediction has.
        truth: how many the truth has.
    """

    matched: tuple[int, int, int]
    pred: tuple[int, int, int]
    truth: tuple[int, int, int]


def match_features(pred: np.ndarray, truth: np.ndarray) -> MatchedFeatures:
    """Count the features that two masks have in common.

    Both masks lie in their union U. A feature is common as far as both have it there: the number of degree k is the
    dimension of the intersection of the images of H_k(prediction) and H_k(truth) in H_k(U). It is what Betti matching
    (Stucki et al. 2023) counts by the comparison with the union, without its choice among features that are born
    together.

    Args:
        pred: bool (Z, Y, X).
        truth: bool, same shape.
    """
    union = pred | truth
    of_pred, of_truth, of_union = (betti_numbers(mask) for mask in (pred, truth, union))
    if not pred.any() or not truth.any():
        return MatchedFeatures((0, 0, 0), of_pred, of_truth)
    cells = np.zeros(tuple(2 * n + 1 for n in pred.shape), np.uint8)
    for bit, mask in ((1, pred), (2, truth)):
        _closure(np.ascontiguousarray(mask).view(np.uint8), cells, bit)
    zero = [_components_hit(union, mask) for mask in (pred, truth)]
    # From the exact sequence of the pair (U, mask), whose part of degree 1 is all that is not known by components.
    one = [
        of_union[1] + own[0] - rank - cell_homology(cells == other)[1]
        for own, rank, other in ((of_pred, zero[0], 2), (of_truth, zero[1], 1))
    ]
    # From that of Mayer and Vietoris.
    shared = cell_homology(cells == 3)[0]
    both_one = of_union[1] - (shared - (of_pred[0] + of_truth[0] - of_union[0]))
    two, both_two = _cavities_hit(pred, truth, union)
    matched = (zero[0] + zero[1] - of_union[0], one[0] + one[1] - both_one, two[0] + two[1] - both_two)
    return MatchedFeatures(matched, of_pred, of_truth)


def _components_hit(union: np.ndarray, mask: np.ndarray) -> int:
    """Return how many components of a set hold voxels of a part of it: the rank of degree 0."""
    labels, _ = label_components(union, 26)
    return len(np.unique(labels[mask]))


def _cavities_hit(pred: np.ndarray, truth: np.ndarray, union: np.ndarray) -> tuple[tuple[int, int], int]:
    """Return the ranks of degree 2 of both masks in their union, and that of both together, by Alexander duality.

    A cavity of the union lies in one component of the background of each mask. The map of degree 2 is dual to that.
    """
    holes, place = np.unique(_background(union), return_index=True)
    place = place[holes > 0]
    # Numbers of the two masks' components, that of the outside is 0 in both.
    numbers = []
    for mask in (pred, truth):
        values = _background(mask)
        found = values.reshape(-1)[place].astype(np.int64)
        numbers.append(np.where(found == values[0, 0, 0], 0, found))
    ranks = tuple(len(np.unique(found[found > 0])) for found in numbers)
    shift = int(numbers[0].max()) + 1
    second = np.where(numbers[1] > 0, numbers[1] + shift, 0)
    nodes = np.unique(np.concatenate([numbers[0], second, [0]]))
    pairs = np.searchsorted(nodes, np.stack([numbers[0], second], axis=1))
    groups = len(np.unique(roots_of(len(nodes), [pairs])))
    return (ranks[0], ranks[1]), len(nodes) - groups


def _background(mask: np.ndarray) -> np.ndarray:
    """Return the components of the background with a border around it, as `label_components` numbers them."""
    return label_components(np.pad(~mask, 1, constant_values=True), 6)[0]
