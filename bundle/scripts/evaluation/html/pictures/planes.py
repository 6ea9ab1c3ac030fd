"""The planes through a place of a volume that a picture shows, each as large as its voxels are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from volumen.evaluation.cases import Scale
from volumen.evaluation.html.report_drawing import ScaleBar, scale_bar

SHOWN = 320
"""A plane shows at most so many voxels of the smallest side around the place."""
SHOWN_FLAT = 640
"""The same of an image."""
WIDTH = 300
"""Of a plane on the page, in pixels of the page, where it is the widest of its view."""
WIDTH_FLAT = 480


@dataclass(frozen=True)
class Plane:
    """A plane of a volume.

    Args:
        normal: the axis across it; None of an image.
        box: voxels of the prediction that it shows, one slice of them.
        words: where it lies and which way its axes run.
        width, height: on the page, in pixels of the page.
        cross: where the place is, as shares of width and height.
        bar: scale bar, or None.
    """

    normal: int | None
    box: tuple[slice, ...]
    words: str
    width: float
    height: float
    cross: tuple[float, float]
    bar: ScaleBar | None

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns of voxels."""
        rows, columns = (part.stop - part.start for part in self._shown())
        return rows, columns

    def inside(self, box: Sequence[slice]) -> tuple[slice, slice] | None:
        """Return the rows and columns that a box of the volume takes of this plane, None where they do not meet."""
        for part, own in zip(box, self.box, strict=True):
            if part.stop <= own.start or own.stop <= part.start:
                return None
        found = []
        for part, own in zip(self._shown(box), self._shown(), strict=True):
            start, stop = max(part.start, own.start), min(part.stop, own.stop)
            found.append(slice(start - own.start, stop - own.start))
        return found[0], found[1]

    def _shown(self, box: Sequence[slice] | None = None) -> list[slice]:
        """Return the parts of a box, or of the own one, along the two axes that the plane shows."""
        return [part for axis, part in enumerate(box or self.box) if axis != self.normal]


def planes_through(
    place: Sequence[int],
    shape: Sequence[int],
    start: Sequence[int],
    scale: Scale,
    shown: int | None = None,
) -> list[Plane]:
    """Return the three orthogonal planes through a place of a volume, or the image itself.

    Args:
        place: voxel of the prediction.
        shape: of the prediction.
        start: first voxel of the prediction in the label's volume, whose voxels the words count.
        scale: voxel size; planes are as large as their voxels.
        shown: most voxels of the smallest side that they show; None: `SHOWN`, of an image `SHOWN_FLAT`.
    """
    sides = [float(side) for side in scale.spacing or (1.0,) * len(shape)]
    most = (shown or (SHOWN if len(shape) == 3 else SHOWN_FLAT)) * min(sides)
    parts = [_around(at, n, most / side) for at, n, side in zip(place, shape, sides, strict=True)]
    lengths = [(part.stop - part.start) * side for part, side in zip(parts, sides, strict=True)]
    pixels = (WIDTH if len(shape) == 3 else WIDTH_FLAT) / max(lengths)
    names = "zyx"[-len(shape) :]
    planes = []
    for normal in range(3) if len(shape) == 3 else (None,):
        rows, columns = (axis for axis in range(len(shape)) if axis != normal)
        box = tuple(
            slice(place[axis], place[axis] + 1) if axis == normal else part for axis, part in enumerate(parts)
        )
        ways = f"{names[columns]} to the right, {names[rows]} down"
        where = "" if normal is None else f"{names[normal]} = {place[normal] + start[normal]}, "
        spacing = scale.spacing[columns] if scale.spacing else None
        cross = [
            (place[axis] + 0.5 - parts[axis].start) / (parts[axis].stop - parts[axis].start)
            for axis in (columns, rows)
        ]
        planes.append(
            Plane(
                normal, box, where + ways, lengths[columns] * pixels, lengths[rows] * pixels, (cross[0], cross[1]),
                scale_bar(parts[columns].stop - parts[columns].start, spacing, scale.unit),
            )
        )  # fmt: skip
    return planes


def _around(at: int, n: int, most: float) -> slice:
    """Return at most so many voxels around a place, at least one."""
    size = max(1, min(n, round(most)))
    start = max(0, min(at - size // 2, n - size))
    return slice(start, start + size)
