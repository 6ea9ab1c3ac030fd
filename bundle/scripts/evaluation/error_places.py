"""Places of the errors of a case: of windows with errors of topology, and of objects."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from volumen.metrics.grid import Region, three_axes
from volumen.metrics.objects.errors import ObjectError, contact_box
from volumen.metrics.objects.numbering import Masks
from volumen.metrics.objects.places import Place, deepest_error, meeting_place, middle_of

SEARCHED = 128
"""Voxels per axis that are searched at once for the place of an error, in an image 16 times as many."""
FLAT_SEARCHED = 2048

Numbering = Callable[[Region], tuple[np.ndarray, np.ndarray]]
"""Gives the predicted and the true object at every voxel of a region (Z, Y, X), 0 for none."""


def place_in_window(window: Region, masks: Masks, spacing: Sequence[float]) -> Place | None:
    """Return the wrong voxel of a window that is farthest from being right, None where none is wrong.

    Args:
        window: three axes.
        masks: gives prediction, truth and known voxels.
        spacing: voxel size (z, y, x).
    """
    best: tuple[float, Place | None] = (-1.0, None)
    for part in _parts(window):
        pred, truth, known = masks(part)
        found = deepest_error(pred & known, truth & known, spacing)
        if found is not None and found[1] > best[0]:
            best = (found[1], _moved(found[0], part))
    return best[1]


def _parts(window: Region) -> Iterator[Region]:
    """Yield parts of a region that fit in memory."""
    side = _side(window)
    steps = [range(part.start, part.stop, side) for part in window]
    for place in itertools.product(*steps):
        yield tuple(slice(at, min(at + side, part.stop)) for at, part in zip(place, window, strict=True))


def _side(window: Region) -> int:
    return FLAT_SEARCHED if window[0].stop - window[0].start == 1 else SEARCHED


def _moved(place: Place, region: Region) -> Place:
    return tuple(at + part.start for at, part in zip(place, region, strict=True))


def place_of_object(
    error: ObjectError, region: Region, numbering: Numbering, spacing: Sequence[float]
) -> Place:
    """Return the voxel at which a wrong object is best seen.

    Of a merged object it is the voxel that is nearest to two of the true objects that it joined, of a broken one that
    nearest to two of its parts, of others their middle, as far as they lie in the region.

    Args:
        error: the object.
        region: where to look, see `blocks_of_errors` and `region_of_object`.
        numbering: gives the objects.
        spacing: voxel size (z, y, x).
    """
    pred, truth = numbering(region)
    own, other = (pred, truth) if error.error in ("merged", "added") else (truth, pred)
    through = own == error.number
    found = None
    if error.parts:
        parts, counts = np.unique(other[through], return_counts=True)
        counts = np.where(np.isin(parts, error.parts), counts, 0)
        largest = parts[np.argsort(-counts, kind="stable")[:2]][: int(np.count_nonzero(counts))]
        if len(largest) == 2:
            one, two = (through & (other == number) for number in largest)
            found = meeting_place(through, one, two, spacing)
    found = found or middle_of(through, spacing)
    # An object that bends around the region: the region's own middle.
    return _moved(found or tuple((part.stop - part.start) // 2 for part in region), region)


def region_of_object(error: ObjectError, table: np.ndarray, shape: Sequence[int]) -> Region:
    """Return where to look for the place of a wrong object whose voxels were counted in one table.

    It is a cube in the middle between the boxes of its two largest parts, or in the middle of its own box.

    Args:
        error: the object.
        table: overlaps of the objects of the volume, see `overlaps`.
        shape: of the volume, three axes.
    """
    boxes = []
    for part in error.parts[:2]:
        pair = (part, error.number) if error.error == "merged" else (error.number, part)
        boxes.append(contact_box(table, *pair))
    ends = [box for box in boxes if box is not None] or [(error.low, error.high)]
    # Boxes that overlap meet in their common part; others across the gap between them.
    low = [max(box[0][axis] for box in ends) for axis in range(3)]
    high = [min(box[1][axis] for box in ends) for axis in range(3)]
    side = FLAT_SEARCHED if shape[0] == 1 else SEARCHED
    region = []
    for a, b, n in zip(low, high, shape, strict=True):
        start = max(0, min((a + b) // 2 - side // 2, n - side))
        region.append(slice(start, min(start + side, n)))
    return tuple(region)


def wide_spacing(spacing: Sequence[float] | None, axes: int) -> tuple[float, ...]:
    """Return a voxel size (z, y, x); an image has a depth of its smallest side."""
    sides = tuple(float(side) for side in spacing or (1.0,) * axes)
    return (min(sides),) * (3 - len(sides)) + sides


def wide_array(values: np.ndarray) -> np.ndarray:
    """Return numbers of objects as int64 (Z, Y, X)."""
    return three_axes(values).astype(np.int64)
