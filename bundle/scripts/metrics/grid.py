"""Blocks of a volume with three axes, and the faces at which neighbouring blocks meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Region = tuple[slice, ...]


def three_axes(values: np.ndarray) -> np.ndarray:
    """Return a view with three axes: an image (Y, X) becomes a volume of one slice."""
    return values.reshape((1,) * (3 - values.ndim) + values.shape)


@dataclass(frozen=True)
class BlockGrid:
    """A volume cut into blocks; the last block of an axis may be smaller.

    Args:
        shape: voxels per axis, three axes.
        block: voxels of a block per axis.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], side: int | Sequence[int]) -> BlockGrid:
        """Return the grid of a 2D or 3D volume; no block is larger than the volume.

        Args:
            shape: voxels per axis, two or three axes.
            side: voxels of a block per axis, one number for all axes or one for each.
        """
        sides = (side,) * len(shape) if isinstance(side, int) else tuple(side)
        whole = (1,) * (3 - len(shape)) + tuple(int(n) for n in shape)
        parts = (1,) * (3 - len(shape)) + tuple(int(s) for s in sides)
        return cls(whole, tuple(max(1, min(n, s)) for n, s in zip(whole, parts, strict=True)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks per axis."""
        return tuple(math.ceil(n / b) for n, b in zip(self.shape, self.block, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def box(self, number: int) -> Region:
        """Return the place of a block, by its number in the order of all blocks, the last axis fastest."""
        index = np.unravel_index(number, self.counts)
        return tuple(
            slice(int(i) * b, min((int(i) + 1) * b, n))
            for i, b, n in zip(index, self.block, self.shape, strict=True)
        )

    def around(self, box: Region, low: int, high: int | None = None) -> Region:
        """Return a box widened by `low` voxels before and `high` voxels behind, cut at the volume's border."""
        after = low if high is None else high
        return tuple(
            slice(max(0, part.start - low), min(n, part.stop + after))
            for part, n in zip(box, self.shape, strict=True)
        )

    def faces(self, number: int) -> Iterator[tuple[tuple[int, int], bool]]:
        """Yield the inner faces of a block: ((block before the face, axis), whether this block lies before it)."""
        index = np.unravel_index(number, self.counts)
        for axis, count in enumerate(self.counts):
            step = math.prod(self.counts[axis + 1 :])
            if index[axis] > 0:
                yield (number - step, axis), False
            if index[axis] + 1 < count:
                yield (number, axis), True


def inside(box: Region, outer: Region) -> Region:
    """Return a box relative to a box that holds it."""
    return tuple(
        slice(part.start - around.start, part.stop - around.start)
        for part, around in zip(box, outer, strict=True)
    )
