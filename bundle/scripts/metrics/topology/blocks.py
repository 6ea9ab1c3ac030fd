"""Components, tunnels and cavities of a mask that comes block by block, for blocks of any size and in any order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from volumen.metrics.grid import BlockGrid, Region
from volumen.metrics.topology.components import ComponentJoin, label_components
from volumen.metrics.topology.counts import Connectivity, euler_sum, neighbours_of
from volumen.utils.jit import compiled


@compiled
def _measure(labels, sizes, low, high):
    """Count the voxels of each number and find the box around them; low and high are int64 (count + 1, 3)."""
    nz, ny, nx = labels.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                number = labels[z, y, x]
                sizes[number] += 1
                low[number, 0], high[number, 0] = min(low[number, 0], z), max(high[number, 0], z + 1)
                low[number, 1], high[number, 1] = min(low[number, 1], y), max(high[number, 1], y + 1)
                low[number, 2], high[number, 2] = min(low[number, 2], x), max(high[number, 2], x + 1)


@dataclass(frozen=True)
class Topology:
    """What a mask consists of.

    Args:
        b0: components.
        b1: tunnels; in 2D holes.
        b2: cavities; in 2D none.
        euler: Euler characteristic, b0 - b1 + b2.
        cavity_boxes: int64 (b2, 7), of each cavity its voxels, the first voxel (z, y, x) of the box around it and the
            one behind its last, largest cavity first.
    """

    b0: int
    b1: int
    b2: int
    euler: int
    cavity_boxes: np.ndarray


@dataclass
class TopologyTally:
    """The topology of one mask, block by block.

    Args:
        grid: the blocks.
        connectivity: neighbourhoods of foreground and background.
        flat: whether the volume is an image, which has no cavities.
    """

    grid: BlockGrid
    connectivity: Connectivity = "26/6"
    flat: bool = False
    eighths: int = 0
    _background: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.objects = ComponentJoin(self.grid)
        self._holes = ComponentJoin(self.grid)

    def add(self, number: int, mask: np.ndarray) -> tuple[np.ndarray, int]:
        """Add a block.

        Args:
            number: which block.
            mask: bool (Z, Y, X): the block and one plane of voxels behind it on every axis, cut at the volume's end.

        Returns:
            uint32, components of the array numbered from 1, and what is added to make the numbers those of the volume.
        """
        box = self.grid.box(number)
        foreground, background = neighbours_of(self.connectivity)
        labels, count = label_components(mask, foreground)
        first = self.objects.add(number, labels, count)
        ends = zip(box, self.grid.shape, strict=True)
        pad = [(int(part.start == 0), int(part.stop == n)) for part, n in ends]
        self.eighths += euler_sum(np.pad(mask, pad), self.connectivity)
        if not self.flat:
            self._add_background(number, box, ~mask, background)
        return labels, first

    def _add_background(self, number: int, box: Region, outside: np.ndarray, neighbours: int) -> None:
        labels, count = label_components(outside, neighbours)
        first = self._holes.add(number, labels, count)
        sizes = np.zeros(count + 1, np.int64)
        low, high = np.full((count + 1, 3), np.iinfo(np.int64).max), np.zeros((count + 1, 3), np.int64)
        own = tuple(slice(0, part.stop - part.start) for part in box)
        _measure(labels[own], sizes, low, high)
        used = np.flatnonzero(sizes[1:]) + 1
        start = np.array([part.start for part in box])
        self._background.append(
            np.column_stack([used - 1 + first, sizes[used], low[used] + start, high[used] + start])
        )

    def merge(self, other: TopologyTally) -> int:
        """Add the blocks of another accumulator; return what was added to its numbers of components."""
        self.eighths += other.eighths
        shift = self._holes.merge(other._holes)
        for rows in other._background:
            self._background.append(rows + np.array([shift] + [0] * 7))
        return self.objects.merge(other.objects)

    def topology(self) -> Topology:
        """Return the topology once all blocks were added."""
        euler = self.eighths // 8
        b0 = len(np.unique(self.objects.roots()))
        cavities = np.zeros((0, 7), np.int64) if self.flat else self._cavities()
        b2 = len(cavities)
        return Topology(b0, b0 + b2 - euler, b2, euler, cavities)

    def _cavities(self) -> np.ndarray:
        """Return the components of the background that do not touch the volume's border."""
        rows = np.concatenate([np.zeros((0, 8), np.int64), *self._background])
        if not len(rows):
            return np.zeros((0, 7), np.int64)
        root = self._holes.roots()[rows[:, 0]]
        order = np.argsort(root, kind="stable")
        rows, root = rows[order], root[order]
        first = np.flatnonzero(np.concatenate([[True], root[1:] != root[:-1]]))
        sizes = np.add.reduceat(rows[:, 1], first)
        low = np.minimum.reduceat(rows[:, 2:5], first, axis=0)
        high = np.maximum.reduceat(rows[:, 5:8], first, axis=0)
        closed = (low > 0).all(axis=1) & (high < self.grid.shape).all(axis=1)
        found = np.column_stack([sizes, low, high])[closed]
        return found[np.lexsort((*found[:, 3:0:-1].T, -found[:, 0]))]
