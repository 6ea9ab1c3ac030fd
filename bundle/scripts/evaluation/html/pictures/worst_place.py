"""The place of a case at which its errors lie densest, found piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from volumen.evaluation.cases import ScoredCase

CELL = 16
"""Voxels per axis of the cells in which errors are added up."""

Errors = Callable[[ScoredCase, tuple[slice, ...]], np.ndarray]
"""Gives the error of every voxel of a box, at least 0; 0 where nothing is known."""


def worst_place(case: ScoredCase, errors: Errors) -> tuple[int, ...]:
    """Return the voxel of the prediction in whose surroundings the errors are largest, the middle where there are none.

    Args:
        case: what is looked at.
        errors: measures them.
    """
    shape = case.prediction.shape
    cells = np.zeros([-(-n // CELL) for n in shape])
    for box in case.pieces():
        _add(cells, box, errors(case, box))
    if not cells.any():
        return tuple(n // 2 for n in shape)
    index = np.unravel_index(int(cells.argmax()), cells.shape)
    box = tuple(slice(int(i) * CELL, min((int(i) + 1) * CELL, n)) for i, n in zip(index, shape, strict=True))
    return _central(errors(case, box), box)


def _add(cells: np.ndarray, box: Sequence[slice], values: np.ndarray) -> None:
    """Add the values of a box to the cells that it touches."""
    for axis, part in enumerate(box):
        first = part.start // CELL
        edges = np.arange(first + 1, -(-part.stop // CELL)) * CELL - part.start
        values = np.add.reduceat(values, np.concatenate([[0], edges]), axis=axis)
    place = tuple(
        slice(part.start // CELL, part.start // CELL + n) for part, n in zip(box, values.shape, strict=True)
    )
    cells[place] += values


def _central(values: np.ndarray, box: Sequence[slice]) -> tuple[int, ...]:
    """Return the voxel with an error that is nearest to the middle of all errors of a box."""
    places = np.argwhere(values > 0)
    weights = values[values > 0]
    if not len(places):
        # Sums of pieces may differ from those of the cell where a derived truth is cut; its middle will do.
        return tuple((part.start + part.stop) // 2 for part in box)
    middle = (places * weights[:, None]).sum(axis=0) / weights.sum()
    nearest = places[((places - middle) ** 2).sum(axis=1).argmin()]
    return tuple(int(at) + part.start for at, part in zip(nearest, box, strict=True))
