"""Boxes: axis-aligned regions of a volume, in voxels."""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[tuple[int, int], ...]
"""(start, stop) per spatial axis, in the volume's axis order; stop is exclusive."""


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box that covers a volume of this spatial shape."""
    return tuple((0, int(size)) for size in shape)


def box_extent(box: Box) -> tuple[int, ...]:
    """Return the box's size in voxels per axis."""
    return tuple(stop - start for start, stop in box)
