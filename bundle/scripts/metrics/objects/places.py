"""Where in a volume an error is: one voxel, through which pictures and viewers show it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.metrics.grid import BlockGrid, Region
from volumen.metrics.objects.contingency import LOW, PRED, TRUTH, VOXELS
from volumen.metrics.objects.errors import ObjectError

Place = tuple[int, ...]


def _distance_to(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return the distance of every voxel to the nearest one of a mask, float32; infinite where it is empty."""
    import edt

    if not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    return np.asarray(edt.edt(np.ascontiguousarray(~mask), anisotropy=tuple(map(float, spacing))))


def _depth(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return the distance of every voxel of a mask to its outside; the array's border is outside."""
    import edt

    sides = tuple(map(float, spacing))
    return np.asarray(edt.edt(np.ascontiguousarray(mask), anisotropy=sides, black_border=True))


def deepest_error(
    pred: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> tuple[Place, float] | None:
    """Return the wrong voxel that is farthest from being right, None where no voxel is wrong.

    That is the predicted voxel farthest from the truth or the missed one farthest from the prediction: the middle of
    a bridge, of a hole, of a cavity, or of an object that was missed or added.

    Args:
        pred: bool (Z, Y, X).
        truth: bool, same shape.
        spacing: voxel size (z, y, x).

    Returns:
        (z, y, x) in the array and its distance in units of the spacing, infinite where the other mask is empty.
    """
    wrong = pred ^ truth
    if not wrong.any():
        return None
    if not pred.any() or not truth.any():
        # Nothing to be near to: the middle of the only mask.
        place = _central(np.where(wrong, _depth(wrong, spacing), -1))
        return place, float("inf")
    distance = np.where(truth, _distance_to(pred, spacing), _distance_to(truth, spacing))
    place = _central(np.where(wrong, distance, -1))
    return place, float(distance[place])


def meeting_place(
    through: np.ndarray, one: np.ndarray, other: np.ndarray, spacing: Sequence[float]
) -> Place | None:
    """Return the voxel of an object that is nearest to both of its parts: where it was joined, or cut.

    Args:
        through: bool (Z, Y, X), the object.
        one: bool, the part of it that is in one object of the other side.
        other: bool, the part of it that is in another one.
        spacing: voxel size (z, y, x).

    Returns:
        (z, y, x) in the array, None where one of the parts has no voxel.
    """
    if not one.any() or not other.any():
        return None
    near = np.maximum(_distance_to(one, spacing), _distance_to(other, spacing))
    return _central(-np.where(through, near, np.inf))


def middle_of(mask: np.ndarray, spacing: Sequence[float]) -> Place | None:
    """Return the voxel of a mask that is farthest from its outside; None where it is empty."""
    return _central(_depth(mask, spacing)) if mask.any() else None


def _central(values: np.ndarray) -> Place:
    """Return the voxel of the largest value; of several the one nearest to their middle."""
    largest = np.argwhere(values >= values.max() - 1e-6)
    middle = largest.mean(axis=0)
    return tuple(largest[((largest - middle) ** 2).sum(axis=1).argmin()].tolist())


def blocks_of_errors(
    tables: Sequence[np.ndarray], roots: tuple[np.ndarray, np.ndarray], grid: BlockGrid,
    errors: Sequence[ObjectError],
) -> dict[tuple[str, int], Region]:  # fmt: skip
    """Return the block in which each of some errors is best seen.

    Of a broken or merged object it is one in which a single connected piece of it holds two of its parts, so it is
    joined or cut there; of a missed or added one the block with the most of its voxels. A broken or merged object
    whose parts meet in no single block has none.

    Args:
        tables: overlaps of components of each block, see `overlaps`, numbered from 1 and not joined.
        roots: joined numbers of the components of truth and prediction, from 1.
        grid: the blocks.
        errors: what to look for.

    Returns:
        (kind of the error, number of the object) to the block's place.
    """
    rows = np.concatenate([np.zeros((0, 9), np.int64), *tables])
    objects = {
        column: np.concatenate([np.zeros(1, np.int64), roots[column]])[rows[:, column]]
        for column in (TRUTH, PRED)
    }
    order = {column: np.argsort(numbers, kind="stable") for column, numbers in objects.items()}
    ordered = {column: objects[column][order[column]] for column in order}
    found = {}
    for error in errors:
        own, other = (PRED, TRUTH) if error.error in ("merged", "added") else (TRUTH, PRED)
        ends = np.searchsorted(ordered[own], [error.number, error.number + 1])
        chosen = order[own][ends[0] : ends[1]]
        row = _telling_row(rows[chosen], objects[other][chosen], error, own)
        if row is not None:
            found[error.error, error.number] = _block_at(row[LOW], grid)
    return found


def _telling_row(rows: np.ndarray, others: np.ndarray, error: ObjectError, own: int) -> np.ndarray | None:
    """Return a row of the piece of an object that shows its error best."""
    if not error.parts:
        pieces, where = np.unique(rows[:, own], return_inverse=True)
        voxels = np.bincount(where.reshape(-1), weights=rows[:, VOXELS], minlength=len(pieces))
        return rows[rows[:, own] == pieces[voxels.argmax()]][0] if len(pieces) else None
    part = np.isin(others, error.parts)
    rows, others = rows[part], others[part]
    best: tuple[int, np.ndarray | None] = (0, None)
    pieces, where, counts = np.unique(rows[:, own], return_inverse=True, return_counts=True)
    for piece in np.flatnonzero(counts > 1):
        inner = where.reshape(-1) == piece
        totals: dict[int, int] = {}
        for number, voxels in zip(others[inner].tolist(), rows[inner, VOXELS].tolist(), strict=True):
            totals[number] = totals.get(number, 0) + voxels
        if len(totals) > 1:
            second = sorted(totals.values())[-2]
            if second > best[0]:
                best = (second, rows[inner][0])
    return best[1]


def _block_at(voxel: np.ndarray, grid: BlockGrid) -> Region:
    index = tuple(int(v) // size for v, size in zip(voxel, grid.block, strict=True))
    return grid.box(int(np.ravel_multi_index(index, grid.counts)))
