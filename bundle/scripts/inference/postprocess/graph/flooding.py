"""Floods the fragments of a volume from those that hold a seed: the watershed of the whole volume, on the graph.

A watershed from seeds assigns each voxel to the seed that it reaches over the lowest pass. Between fragments, which are
basins of steepest descent, this is a minimum spanning forest of the graph by the passes (Meyer 1994; Cousty et al.
2009). It is found in rounds, in each of which every tree without a seed grows over its lowest pass (Boruvka 1926). So
the passes need no order and no place in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from volumen.inference.postprocess.graph.contracting import join_over_passes
from volumen.inference.postprocess.graph.passes import NO_PASS
from volumen.utils.jit import compiled


def flood(links: Callable[[], Iterable[np.ndarray]], seeds: np.ndarray) -> np.ndarray:
    """Return the region of each fragment, uint32 from 1 in the order of their first fragments, 0 without a seed.

    Memory holds 24 bytes per fragment. The links are read once per round, of which there are few: in each, the trees
    that can grow become at most half as many.

    Args:
        links: returns the passes in arrays of `LINK`, the same at each call; several between two fragments count as
            the lowest one.
        seeds: peaks in each fragment.
    """
    root = np.arange(len(seeds) + 1, dtype=np.uint32)
    bound = np.concatenate([[True], seeds > 0])
    best, behind = np.empty(len(root), np.int64), np.zeros(len(root), np.uint32)
    while True:
        best[:] = NO_PASS
        for part in links():
            _find_lowest(part["first"], part["second"], part["over"], root, bound, best, behind)
        if not join_over_passes(root, bound, best, behind):
            return _numbered(root, np.concatenate([[False], seeds > 0]))


@compiled
def _find_lowest(first, second, over, root, bound, best, behind):
    """Write the lowest pass out of each tree that can grow, and the tree behind it; see `find_lowest_passes`."""
    for i in range(over.size):
        u, v = root[first[i]], root[second[i]]
        if u == v:
            continue
        if not bound[u] and over[i] < best[u]:
            best[u], behind[u] = over[i], v
        if not bound[v] and over[i] < best[v]:
            best[v], behind[v] = over[i], u


@compiled
def _numbered(root, has_seed):
    """Return the number of the tree of each fragment, from 1 in the order of the first fragments; 0 without a seed."""
    grown = np.zeros(root.size, np.bool_)
    for number in range(1, root.size):
        grown[root[number]] |= has_seed[number]
    rank = np.zeros(root.size, np.uint32)
    region = np.zeros(root.size - 1, np.uint32)
    count = 0
    for number in range(1, root.size):
        tree = root[number]
        if grown[tree]:
            if rank[tree] == 0:
                count += 1
                rank[tree] = count
            region[number - 1] = rank[tree]
    return region
