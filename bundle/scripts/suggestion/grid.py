"""The grid of candidate boxes over a volume, and exact sums over them. Pure numerics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from volumen.data.index.cells import AxisCut

Region = tuple[slice, ...]


@dataclass(frozen=True)
class BoxGrid:
    """Boxes of one size over a volume, half a box apart; the last box of an axis ends with the volume.

    A box longer than the volume along an axis has the whole axis. The borders of all boxes cut the volume into cells,
    so that every box consists of whole cells.

    Args:
        shape: spatial shape of the volume.
        size: voxels of a box per axis, as asked.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """Voxels of a box per axis, no more than the volume has."""
        return tuple(min(side, n) for side, n in zip(self.size, self.shape, strict=True))

    @cached_property
    def starts(self) -> tuple[np.ndarray, ...]:
        """First voxels of the boxes per axis."""
        return tuple(
            np.unique(np.append(np.arange(0, n - side + 1, max(1, side // 2)), n - side))
            for side, n in zip(self.extent, self.shape, strict=True)
        )

    @cached_property
    def edges(self) -> tuple[np.ndarray, ...]:
        """Borders of the cells per axis, from 0 to the volume's end."""
        return tuple(
            np.unique(np.concatenate([first, first + side]))
            for first, side in zip(self.starts, self.extent, strict=True)
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Boxes per axis."""
        return tuple(map(len, self.starts))

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells per axis."""
        return tuple(len(edge) - 1 for edge in self.edges)

    def corners(self) -> np.ndarray:
        """Return the first voxel of every box, (N, D), in C order."""
        return np.stack(np.meshgrid(*self.starts, indexing="ij"), axis=-1).reshape(-1, len(self.shape))

    def box_sums(self, cells: np.ndarray) -> np.ndarray:
        """Sum cells over every box.

        Args:
            cells: int64 (..., *cells).

        Returns:
            int64 (..., N), in the order of `corners`.
        """
        sums = cells
        lead = cells.ndim - len(self.shape)
        for axis, (edge, first, side) in enumerate(
            zip(self.edges, self.starts, self.extent, strict=True), lead
        ):
            shape = list(sums.shape)
            shape[axis] += 1
            total = np.zeros(shape, np.int64)
            np.cumsum(sums, axis=axis, out=total[(slice(None),) * axis + (slice(1, None),)])
            low, high = np.searchsorted(edge, first), np.searchsorted(edge, first + side)
            sums = total.take(high, axis) - total.take(low, axis)
        return sums.reshape(*cells.shape[:lead], -1)

    def blocks(self, voxels: int) -> Iterator[Region]:
        """Cut the cells into blocks of at most about `voxels` voxels each; a block has at least one cell.

        Yields:
            The cells of a block, a slice per axis.
        """
        step = list(self.cells)
        widest = [int(np.diff(edge).max()) for edge in self.edges]
        while math.prod(s * w for s, w in zip(step, widest, strict=True)) > voxels and max(step) > 1:
            axis = next(axis for axis, count in enumerate(step) if count > 1)
            step[axis] = -(-step[axis] // 2)
        ranges = [range(0, n, s) for n, s in zip(self.cells, step, strict=True)]
        for corner in itertools.product(*ranges):
            yield tuple(slice(a, min(a + s, n)) for a, s, n in zip(corner, step, self.cells, strict=True))

    def region(self, cells: Region) -> Region:
        """Return the voxels of a block of cells."""
        return tuple(
            slice(int(edge[part.start]), int(edge[part.stop]))
            for edge, part in zip(self.edges, cells, strict=True)
        )

    def cuts(self, region: Region) -> list[AxisCut]:
        """Return how a block of whole cells is cut, for `cell_totals`."""
        found = [
            AxisCut.of(edge, part.start, part.stop) for edge, part in zip(self.edges, region, strict=True)
        ]
        return [cut for cut in found if cut is not None]
