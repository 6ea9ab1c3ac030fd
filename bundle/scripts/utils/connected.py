"""Groups of numbers that pairs connect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def roots_of(count: int, pairs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smallest of the numbers 0 to count - 1 that each is connected with by pairs, int64 (count,).

    Args:
        count: how many numbers there are.
        pairs: arrays (n, 2) of connected numbers.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count))
    groups, group = connected_components(graph, directed=False)
    smallest = np.full(groups, count, np.int64)
    np.minimum.at(smallest, group, np.arange(count))
    return smallest[group]
