"""Where in a volume an error is: one voxel, through which pictures and viewers show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    tables: Sequence[np.ndarray],
    roots: tuple[np.ndarray, np.ndarray],
    joins: tuple[np.ndarray, np.ndarray],
    grid: BlockGrid,
    errors: Sequence[ObjectError],
) -> dict[tuple[str, int], Region]:
    """Return where each of some errors is best seen: a block, or two neighbouring ones.

    Of a broken or merged object it is a block in which a single connected piece of it holds two of its parts, so it is
    joined or cut there; else two neighbouring blocks whose pieces hold different parts and touch. Of a missed or added
    object it is the block with the most of its voxels. An object that is joined by a bridge longer than two blocks has
    none.

    Args:
        tables: overlaps of components of each block, see `overlaps`, numbered from 1 and not joined.
        roots: joined numbers of the components of truth and prediction, from 1.
        joins: int64 (n, 2), numbers from 0 of touching components of truth and prediction.
        grid: the blocks.
        errors: what to look for.

    Returns:
        (kind of the error, number of the object) to the place of the block or blocks.
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
        pieces = _Pieces.of(rows[chosen], objects[other][chosen], own)
        region = pieces.largest(grid) if not error.parts else pieces.meeting(error.parts, grid)
        if region is None:
            touching = joins[own][roots[own][joins[own][:, 0]] == error.number] + 1
            region = pieces.touching(error.parts, touching, grid)
        if region is not None:
            found[error.error, error.number] = region
    return found


@dataclass(frozen=True)
class _Pieces:
    """The connected pieces of an object in blocks.

    Args:
        numbers: int64 (n,), a row per piece and object of the other side: the piece.
        others: int64 (n,), that object, 0 for none.
        voxels: int64 (n,), voxels of both.
        low: int64 (n, 3), a voxel of the piece.
    """

    numbers: np.ndarray
    others: np.ndarray
    voxels: np.ndarray
    low: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, others: np.ndarray, own: int) -> _Pieces:
        """Return the pieces of the rows of a table; a piece may have several rows with one object."""
        keys, first, where = np.unique(
            np.column_stack([rows[:, own], others]), axis=0, return_index=True, return_inverse=True
        )
        voxels = np.bincount(where.reshape(-1), weights=rows[:, VOXELS], minlength=len(keys))
        return cls(keys[:, 0], keys[:, 1], voxels.astype(np.int64), rows[first][:, LOW])

    def largest(self, grid: BlockGrid) -> Region | None:
        """Return the block of the piece with the most voxels."""
        if not len(self.numbers):
            return None
        pieces, where = np.unique(self.numbers, return_inverse=True)
        total = np.bincount(where.reshape(-1), weights=self.voxels)
        return self._block(int(pieces[total.argmax()]), grid)

    def meeting(self, parts: Sequence[int], grid: BlockGrid) -> Region | None:
        """Return the block of the piece that holds the most of a second part."""
        here = np.isin(self.others, parts)
        order = np.lexsort((-self.voxels[here], self.numbers[here]))
        numbers, voxels = self.numbers[here][order], self.voxels[here][order]
        # The second row of a piece, its rows being sorted by voxels.
        new = np.concatenate([[True], numbers[1:] != numbers[:-1]])[: len(numbers)]
        second = np.flatnonzero(~new & np.concatenate([[False], new[:-1]])[: len(numbers)])
        if not len(second):
            return None
        return self._block(int(numbers[second[voxels[second].argmax()]]), grid)

    def touching(self, parts: Sequence[int], joins: np.ndarray, grid: BlockGrid) -> Region | None:
        """Return the blocks of two pieces that touch and hold different parts.

        Args:
            parts: objects of the other side.
            joins: int64 (n, 2), pieces of this object that touch.
            grid: the blocks.
        """
        here = np.isin(self.others, parts)
        part_of = dict(zip(self.numbers[here].tolist(), self.others[here].tolist(), strict=True))
        for one, two in joins.tolist():
            if len({part_of.get(one), part_of.get(two)} - {None}) == 2:
                boxes = [self._block(one, grid), self._block(two, grid)]
                return tuple(
                    slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(*boxes, strict=True)
                )
        return None

    def _block(self, piece: int, grid: BlockGrid) -> Region:
        low = self.low[np.flatnonzero(self.numbers == piece)[0]]
        index = tuple(int(v) // size for v, size in zip(low, grid.block, strict=True))
        return grid.box(int(np.ravel_multi_index(index, grid.counts)))
