"""Which objects of two label volumes overlap, by how many voxels and where.

The table of overlaps is all that scores of splits, merges and matched objects need. Tables of blocks add up to that of
the volume. Numbers are 64-bit integers throughout: floating point would confuse those above 2^53.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.metrics.grid import three_axes
from volumen.utils.jit import compiled

TRUTH, PRED, VOXELS = 0, 1, 2
"""Columns of a table: number in the truth, number in the prediction, voxels of both."""
LOW, HIGH = slice(3, 6), slice(6, 9)
"""Columns of a table: first voxel (z, y, x) of the box around the overlap, and the voxel behind its last one."""
COLUMNS = 9


@compiled
def _runs(pred, truth, known, out):
    """Write the runs of equal pairs along the last axis; return how many there are.

    Runs without an object in truth and prediction, and unknown voxels, are left out. `out` is int64 (n, 9), or of
    no rows to count the runs only.
    """
    nz, ny, nx = pred.shape
    count = 0
    for z in range(nz):
        for y in range(ny):
            start = 0
            while start < nx:
                p, t, k = pred[z, y, start], truth[z, y, start], known[z, y, start]
                stop = start + 1
                while (
                    stop < nx and pred[z, y, stop] == p and truth[z, y, stop] == t and known[z, y, stop] == k
                ):
                    stop += 1
                if k and (p != 0 or t != 0):
                    if len(out):
                        out[count, 0], out[count, 1], out[count, 2] = t, p, stop - start
                        out[count, 3], out[count, 4], out[count, 5] = z, y, start
                        out[count, 6], out[count, 7], out[count, 8] = z + 1, y + 1, stop
                    count += 1
                start = stop
    return count


def overlaps(
    pred: np.ndarray,
    truth: np.ndarray,
    known: np.ndarray | None = None,
    start: Sequence[int] = (0, 0, 0),
) -> np.ndarray:
    """Return the table of overlapping objects.

    Args:
        pred: integer (Y, X) or (Z, Y, X), 0 for no object.
        truth: integer, same shape.
        known: bool, same shape; voxels outside it are not counted. None: all are counted.
        start: place of the array in the volume, (z, y, x).

    Returns:
        int64 (n, 9), a row per pair of numbers that are not both 0, sorted by the numbers: number in the truth, number
        in the prediction, voxels, first voxel (z, y, x) of the box around them, and the voxel behind its last one.
        Numbers of uint64 above 2^63 become negative; they stay different from all others.
    """
    certain = np.ones(pred.shape, bool) if known is None else known.astype(bool)
    a, b, c = (
        np.ascontiguousarray(three_axes(x))
        for x in (_integers(pred), _integers(truth), certain.view(np.uint8))
    )
    rows = np.zeros((_runs(a, b, c, np.zeros((0, COLUMNS), np.int64)), COLUMNS), np.int64)
    if len(rows):
        _runs(a, b, c, rows)
    shift = np.concatenate([np.zeros(3 - len(start), np.int64), np.asarray(start, np.int64)])
    rows[:, LOW] += shift
    rows[:, HIGH] += shift
    return add_overlaps([rows])


def _integers(labels: np.ndarray) -> np.ndarray:
    """Return labels as a type that compiled code knows; numbers stay different."""
    if labels.dtype.kind not in "iub":
        raise ValueError(f"objects must be numbered by integers, got {labels.dtype}")
    return labels.view(np.uint8) if labels.dtype == bool else labels


def add_overlaps(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Return the table of several parts of a volume together, see `overlaps`."""
    rows = np.concatenate([table.reshape(-1, COLUMNS).astype(np.int64, copy=False) for table in tables])
    if not len(rows):
        return rows
    rows = rows[np.lexsort((rows[:, PRED], rows[:, TRUTH]))]
    new = (rows[1:, TRUTH] != rows[:-1, TRUTH]) | (rows[1:, PRED] != rows[:-1, PRED])
    first = np.flatnonzero(np.concatenate([[True], new]))
    out = rows[first]
    out[:, VOXELS] = np.add.reduceat(rows[:, VOXELS], first)
    out[:, LOW] = np.minimum.reduceat(rows[:, LOW], first, axis=0)
    out[:, HIGH] = np.maximum.reduceat(rows[:, HIGH], first, axis=0)
    return out


def renumbered(table: np.ndarray, truth: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Return a table whose numbers from 1 are replaced, rows of the same new pair added up.

    Args:
        table: as of `overlaps`, with numbers from 0.
        truth: new number of each true object, from 0 for number 1.
        pred: the same for predicted objects.
    """
    rows = table.copy()
    for column, new in ((TRUTH, truth), (PRED, pred)):
        rows[:, column] = np.concatenate([np.zeros(1, np.int64), new])[table[:, column]]
    return add_overlaps([rows])


def objects_of(table: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the objects of one side of a table, in ascending order of their numbers.

    Args:
        table: as of `overlaps`.
        column: `TRUTH` or `PRED`.

    Returns:
        numbers, int64 (k,); voxels, int64 (k,); boxes, int64 (k, 6): first voxel, and the one behind the last.
    """
    rows = table[table[:, column] != 0]
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 6), np.int64)
    rows = rows[np.argsort(rows[:, column], kind="stable")]
    first = np.flatnonzero(np.concatenate([[True], rows[1:, column] != rows[:-1, column]]))
    low = np.minimum.reduceat(rows[:, LOW], first, axis=0)
    high = np.maximum.reduceat(rows[:, HIGH], first, axis=0)
    return rows[first, column], np.add.reduceat(rows[:, VOXELS], first), np.concatenate([low, high], axis=1)
