"""How wide the objects of a label are, measured on a sample of its voxels."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from volumen.derived.long_range import chord_counts

if TYPE_CHECKING:
    from volumen.data.layout import OpenCase

logger = logging.getLogger(__name__)

SIDE, MOST_CASES = 96, 4


def object_width(
    cases: Sequence[OpenCase], target: str, *, ignore: int | None = None, numbered: bool = False
) -> tuple[float, ...] | None:
    """Return the mean length of the stretches of objects along each axis, in voxels; None without any object.

    Read are blocks of up to 96 voxels a side in the middle of the two halves of each axis, of the first four volumes
    that have the label. A stretch ends with its block, so objects wider than a block count as that wide at most.

    Args:
        cases: the opened volumes.
        target: the label.
        ignore: label value that means unknown.
        numbered: whether different numbers are different objects.
    """
    voxels, runs = 0, np.zeros(len(cases[0].spacing), np.int64)
    for case in [case for case in cases if target in case.labels][:MOST_CASES]:
        volume = case.labels[target]
        for box in _boxes(volume.shape):
            values = volume.read(box)
            if ignore is not None:
                values = np.where(values == ignore, 0, values)
            several = len(values) > 1
            labels: np.ndarray = values[0]
            if several or not numbered:
                labels = np.asarray((values > 0).any(axis=0), np.uint8)
            count, found = chord_counts(labels)
            voxels += count
            runs += np.array(found)
    return tuple(voxels / runs) if voxels else None


def _boxes(shape: Sequence[int]) -> list[tuple[slice, ...]]:
    """Return blocks around the middles of the two halves of every axis, one where they would overlap."""
    sides = []
    for n in shape:
        if n < 2 * SIDE:
            start = max(0, (n - SIDE) // 2)
            sides.append([slice(start, min(n, start + SIDE))])
        else:
            sides.append([slice(q - SIDE // 2, q + SIDE // 2) for q in (n // 4, 3 * n // 4)])
    return [tuple(box) for box in itertools.product(*sides)]
