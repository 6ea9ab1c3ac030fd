"""How well two partitions into objects agree: adapted Rand error and variation of information.

Both follow from the table of overlaps, see `volumen.metrics.objects.contingency`.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from volumen.metrics.objects.contingency import PRED, TRUTH, VOXELS

Domain = Literal["truth", "union"]
"""Voxels that count: those of a true object, or those of a true or a predicted one."""


def _counted(table: np.ndarray, domain: Domain) -> np.ndarray:
    return table[table[:, TRUTH] != 0] if domain == "truth" else table


def _sizes(table: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels of each object of a side, and for each row which of them it belongs to."""
    _, group = np.unique(table[:, column], return_inverse=True)
    group = group.reshape(-1)
    # Sums of integers: as floating point they would depend on the order of the rows above 2^53.
    sizes = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    np.add.at(sizes, group, table[:, VOXELS])
    return sizes, group


def adapted_rand_error(table: np.ndarray) -> float:
    """Return 1 - the F score of pairs of voxels that are together in both partitions.

    Arganda-Carreras et al. 2015, over the voxels of true objects as in the SNEMI3D challenge; 0 is perfect, 1 the
    worst. Every pair of different voxels counts once. What the prediction left to no object counts as one object. NaN
    without a true object.

    Args:
        table: as of `overlaps`.
    """
    rows = _counted(table, "truth")
    if not len(rows):
        return math.nan
    total = _pairs_within(_sizes(rows, TRUTH)[0]) + _pairs_within(_sizes(rows, PRED)[0])
    return 1 - 2 * _pairs_within(rows[:, VOXELS]) / total if total else 0.0


def _pairs_within(sizes: np.ndarray) -> int:
    """Return the ordered pairs of different voxels within objects, as a Python integer of any length."""
    return sum(size * (size - 1) for size in sizes.tolist())


def voi_split(table: np.ndarray, domain: Domain = "truth") -> float:
    """Return H(prediction | truth) in bits: how far true objects were cut up. 0 is perfect, NaN without voxels."""
    return _conditional_entropy(table, TRUTH, domain)


def voi_merge(table: np.ndarray, domain: Domain = "truth") -> float:
    """Return H(truth | prediction) in bits: how far true objects were joined. 0 is perfect, NaN without voxels.

    Meila 2003; the variation of information is the sum of both parts, Nunez-Iglesias et al. 2013.
    """
    return _conditional_entropy(table, PRED, domain)


def _conditional_entropy(table: np.ndarray, given: int, domain: Domain) -> float:
    rows = _counted(table, domain)
    if not len(rows):
        return math.nan
    sizes, group = _sizes(rows, given)
    voxels = rows[:, VOXELS].astype(np.float64)
    # Never -0.0 for a perfect partition.
    return float(max((voxels * np.log2(sizes[group] / voxels)).sum() / voxels.sum(), 0.0))
