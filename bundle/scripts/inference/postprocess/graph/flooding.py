"""Floods the fragments of a volume from those that hold a seed: the watershed of the whole volume, on the graph.

A watershed from seeds assigns each voxel to the seed that it reaches over the lowest pass. Between fragments, which are
basins of steepest descent, this is a minimum spanning forest of the graph by the passes (Meyer 1994; Cousty et al.
2009).
"""

from __future__ import annotations

import numpy as np

from volumen.inference.postprocess.graph.edges import FIRST, LOWEST, SECOND, add_rows
from volumen.utils.jit import compiled

ROWS = 1 << 21
"""Rows of the table that are read at once."""


def flood(table: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Return the region of each fragment, uint32 from 1 in the order of their first fragments, 0 without a seed.

    Memory holds 24 bytes per edge. Of equal passes that of the smaller fragment numbers is flooded first.

    Args:
        table: the edges.
        seeds: peaks in each fragment.
    """
    order = np.argsort(np.asarray(table[:, LOWEST]).astype(np.int32), kind="stable")
    root = np.arange(len(seeds), dtype=np.int64)
    has_seed = seeds > 0
    _join(
        order,
        np.ascontiguousarray(table[:, FIRST]).astype(np.uint32),
        np.ascontiguousarray(table[:, SECOND]).astype(np.uint32),
        root,
        has_seed,
    )
    _, first, region = np.unique(root, return_index=True, return_inverse=True)
    kept = has_seed[root[first]]
    rank = np.zeros(len(first), np.uint32)
    by_first = np.argsort(first)
    rank[by_first[kept[by_first]]] = np.arange(1, kept.sum() + 1, dtype=np.uint32)
    return rank[region]


@compiled
def _root_of(root, number):
    """Return the root of a number, and shorten the path to it."""
    end = number
    while root[end] != end:
        end = root[end]
    while root[number] != end:
        root[number], number = end, root[number]
    return end


@compiled
def _join(order, first, second, root, has_seed):
    """Join fragments over edges in an order, unless both sides hold a seed; afterwards `root` is that of each."""
    for i in range(order.size):
        u = _root_of(root, np.int64(first[order[i]]) - 1)
        v = _root_of(root, np.int64(second[order[i]]) - 1)
        if u == v or (has_seed[u] and has_seed[v]):
            continue
        low, high = min(u, v), max(u, v)
        root[high] = low
        has_seed[low] = has_seed[low] or has_seed[high]
    for i in range(root.size):
        root[i] = _root_of(root, i)


def table_of_regions(table: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Return the edges between regions, rows of the same two added up.

    Args:
        table: the edges between fragments.
        region: region of each fragment, 0 for none.
    """
    found = np.zeros((0, table.shape[1]), np.int64)
    for start in range(0, len(table), ROWS):
        rows = np.array(table[start : start + ROWS])
        pairs = np.sort(region[rows[:, :2] - 1].astype(np.int64), axis=1)
        rows[:, :2] = pairs
        rows = rows[(pairs[:, 0] > 0) & (pairs[:, 0] != pairs[:, 1])]
        found = add_rows(np.concatenate([found, add_rows(rows)]))
    return found
