"""How well two partitions into instances agree: adapted Rand error and variation of information.

All of them follow from how many voxels each pair of instances shares, and such counts add up over blocks.
"""

from __future__ import annotations

import math

import numpy as np


def pair_counts(pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Count the voxels of every pair of a true and a predicted instance.

    Args:
        pred: integer, any shape; 0 is what the prediction left to no instance.
        truth: integer, same shape; voxels of 0, no instance, are not counted, as in the SNEMI3D challenge.
        known: bool, same shape; voxels outside it are not counted. None: all.

    Returns:
        float64 (pairs, 3): true number, predicted number, voxels; sorted by the numbers.
    """
    counted = truth != 0 if known is None else (truth != 0) & known
    pairs = np.stack([truth[counted], pred[counted]], axis=1).astype(np.int64)
    return _table(pairs.reshape(-1, 2), np.ones(len(pairs)))


def add_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the counts of two parts of a volume together, see `pair_counts`."""
    both = np.concatenate([first.reshape(-1, 3), second.reshape(-1, 3)])
    return _table(both[:, :2].astype(np.int64), both[:, 2])


def _table(pairs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    if not len(pairs):
        return np.zeros((0, 3))
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs, counts = pairs[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], (pairs[1:] != pairs[:-1]).any(axis=1)]))
    return np.column_stack([pairs[first].astype(np.float64), np.add.reduceat(counts, first)])


def _sizes(counts: np.ndarray, column: int) -> np.ndarray:
    _, group = np.unique(counts[:, column], return_inverse=True)
    return np.bincount(group.reshape(-1), weights=counts[:, 2])


def adapted_rand_error(counts: np.ndarray) -> float:
    """Return 1 - the F score of pairs of voxels that are together in both partitions.

    Arganda-Carreras et al. 2015; 0 is perfect. Every pair of different voxels counts once. What the prediction left
    to no instance counts as one instance. NaN without a true instance.

    Args:
        counts: as of `pair_counts`.
    """
    if not len(counts):
        return math.nan
    together = _pairs_within(counts[:, 2])
    total = _pairs_within(_sizes(counts, 0)) + _pairs_within(_sizes(counts, 1))
    return float(1 - 2 * together / total) if total else 0.0


def _pairs_within(sizes: np.ndarray) -> float:
    return float((sizes * (sizes - 1)).sum())


def vi_split(counts: np.ndarray) -> float:
    """Return H(prediction | truth) in bits: what true instances were cut into. 0 is perfect, NaN without truth."""
    return _conditional_entropy(counts, given=0)


def vi_merge(counts: np.ndarray) -> float:
    """Return H(truth | prediction) in bits: what predicted instances glued together. 0 is perfect.

    Meila 2003; the variation of information is the sum of both parts, Nunez-Iglesias et al. 2013. NaN without truth.
    """
    return _conditional_entropy(counts, given=1)


def _conditional_entropy(counts: np.ndarray, given: int) -> float:
    if not len(counts):
        return math.nan
    _, group = np.unique(counts[:, given], return_inverse=True)
    group = group.reshape(-1)
    sizes = np.bincount(group, weights=counts[:, 2])
    # Never -0.0 for a perfect partition.
    return float(max((counts[:, 2] * np.log2(sizes[group] / counts[:, 2])).sum() / counts[:, 2].sum(), 0.0))
