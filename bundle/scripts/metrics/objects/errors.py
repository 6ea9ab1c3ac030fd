"""Objects that a prediction broke, joined, missed or added, and where they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volumen.metrics.objects.contingency import HIGH, LOW, PRED, TRUTH, VOXELS, objects_of

SHARE = 0.1
"""The part of an object that must be covered for two objects to belong together."""


@dataclass(frozen=True)
class ObjectError:
    """One object that is wrong.

    Args:
        error: broken, merged, missed or added.
        number: of the true object, or of the predicted one where that was merged or added.
        voxels: of it.
        low: first voxel (z, y, x) of the box around it.
        high: voxel behind the last one of the box.
        parts: the objects of the other side that it was broken into or merged of, largest first.
        wrong: voxels that the error is about: those outside the largest part; of missed and added ones all.
    """

    error: str
    number: int
    voxels: int
    low: tuple[int, ...]
    high: tuple[int, ...]
    parts: tuple[int, ...]
    wrong: int


@dataclass(frozen=True)
class ObjectErrors:
    """All wrong objects of a volume.

    Args:
        broken: true objects of which several predicted ones cover at least `share` each.
        merged: predicted objects that cover at least `share` of each of several true ones.
        missed: true objects of which no predicted one covers at least `share`.
        added: predicted objects of which true objects together cover less than `share`.
        true: how many true objects there are.
        predicted: how many predicted objects there are.
    """

    broken: tuple[ObjectError, ...]
    merged: tuple[ObjectError, ...]
    missed: tuple[ObjectError, ...]
    added: tuple[ObjectError, ...]
    true: int
    predicted: int

    def worst(self, most: int) -> list[ObjectError]:
        """Return up to `most` errors of each kind, those of the most voxels first."""
        found = []
        for errors in (self.merged, self.broken, self.missed, self.added):
            found += sorted(errors, key=lambda error: (-error.wrong, error.low, error.number))[:most]
        return found


def object_errors(table: np.ndarray, share: float = SHARE) -> ObjectErrors:
    """Find the wrong objects.

    Args:
        table: as of `overlaps`.
        share: part of an object that must be covered, above 0 and at most 1.
    """
    both = table[(table[:, TRUTH] != 0) & (table[:, PRED] != 0)]
    true, true_voxels, true_boxes = objects_of(table, TRUTH)
    found, found_voxels, found_boxes = objects_of(table, PRED)
    row_true = np.searchsorted(true, both[:, TRUTH])
    row_found = np.searchsorted(found, both[:, PRED])
    joined = both[:, VOXELS] >= share * true_voxels[row_true]
    covering = np.bincount(row_true[joined], minlength=len(true))
    covered = np.bincount(row_found[joined], minlength=len(found))
    of_truth = np.zeros(len(found), np.int64)
    np.add.at(of_truth, row_found, both[:, VOXELS])
    sides = ((true, true_voxels, true_boxes), (found, found_voxels, found_boxes))
    links = both[joined]
    return ObjectErrors(
        _several("broken", sides[0], covering, links, TRUTH, PRED),
        _several("merged", sides[1], covered, links, PRED, TRUTH),
        _alone("missed", sides[0], np.flatnonzero(covering == 0)),
        _alone("added", sides[1], np.flatnonzero(of_truth < share * found_voxels)),
        len(true),
        len(found),
    )


_Side = tuple[np.ndarray, np.ndarray, np.ndarray]


def _several(
    error: str, side: _Side, parts: np.ndarray, links: np.ndarray, own: int, other: int
) -> tuple[ObjectError, ...]:
    """Return the objects of a side that belong together with several of the other."""
    numbers, voxels, boxes = side
    wrong = np.flatnonzero(parts > 1)
    # All links of an object lie together and the largest comes first.
    links = links[np.lexsort((links[:, other], -links[:, VOXELS], links[:, own]))]
    starts = np.searchsorted(links[:, own], numbers[wrong], side="left")
    found = []
    for i, start in zip(wrong, starts, strict=True):
        rows = links[start : start + parts[i]]
        found.append(
            ObjectError(
                error, int(numbers[i]), int(voxels[i]), _place(boxes[i, :3]), _place(boxes[i, 3:]),
                tuple(rows[:, other].tolist()), int(rows[1:, VOXELS].sum()),
            )
        )  # fmt: skip
    return tuple(found)


def _alone(error: str, side: _Side, which: np.ndarray) -> tuple[ObjectError, ...]:
    numbers, voxels, boxes = side
    return tuple(
        ObjectError(
            error, int(numbers[i]), int(voxels[i]), _place(boxes[i, :3]), _place(boxes[i, 3:]), (), int(voxels[i])
        )
        for i in which
    )  # fmt: skip


def _place(voxel: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in voxel)


def contact_box(table: np.ndarray, truth: int, pred: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the box around the voxels that two objects share, None where they share none."""
    rows = table[(table[:, TRUTH] == truth) & (table[:, PRED] == pred)]
    return (_place(rows[0, LOW]), _place(rows[0, HIGH])) if len(rows) else None
