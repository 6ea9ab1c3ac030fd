"""Connected components of masks that come block by block, for blocks of any size and in any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from volumen.metrics.grid import BlockGrid
from volumen.utils.connected import roots_of


def label_components(mask: np.ndarray, neighbours: int) -> tuple[np.ndarray, int]:
    """Return the connected components of a mask, numbered from 1, and how many there are.

    Args:
        mask: bool (Z, Y, X).
        neighbours: 26 (voxels that share a corner, an edge or a face) or 6 (a face). In a volume of one slice these
            are the 8 and 4 neighbours of a pixel.
    """
    import cc3d

    if not mask.any():
        return np.zeros(mask.shape, np.uint32), 0
    voxels = np.ascontiguousarray(mask).view(np.uint8)
    degree: Literal[6, 26] = 26 if neighbours == 26 else 6
    labels, count = cc3d.connected_components(voxels, connectivity=degree, return_N=True, binary_image=True)
    return labels, int(count)


def _pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the different pairs of numbers above 0 that lie at the same place, int64 (n, 2)."""
    a, b = one.reshape(-1), other.reshape(-1)
    both = (a > 0) & (b > 0)
    packed = (a[both].astype(np.uint64) << np.uint64(32)) | b[both].astype(np.uint64)
    packed = np.unique(packed[np.flatnonzero(np.diff(packed, prepend=np.uint64(0)))])
    low = packed & np.uint64(0xFFFFFFFF)
    return np.stack([packed >> np.uint64(32), low], axis=1).astype(np.int64)


@dataclass
class ComponentJoin:
    """Numbers of components in blocks, and which of them are parts of the same component.

    A block is labelled together with the first plane of voxels of the blocks behind it. Two neighbouring blocks thus
    both number the plane at their face: numbers at the same voxel are of the same component. Only planes whose other
    side has not come yet are stored.

    Args:
        grid: the blocks.
    """

    grid: BlockGrid
    count: int = 0
    first: dict[int, int] = field(default_factory=dict)
    _open: dict[tuple[int, int], tuple[int, np.ndarray]] = field(default_factory=dict)
    _pairs: list[np.ndarray] = field(default_factory=list)

    def add(self, number: int, labels: np.ndarray, count: int) -> int:
        """Add a block and return what is added to its numbers, less 1, to make them those of the volume.

        Args:
            number: which block.
            labels: uint32, components of the block and of one plane behind it on every axis, cut at the volume's end.
            count: how many components there are.
        """
        first = self.first[number] = self.count
        self.count += count
        for face, before in self.grid.faces(number):
            plane = np.ascontiguousarray(np.take(labels, -1 if before else 0, axis=face[1])).astype(np.uint32)
            self._meet(face, number, plane)
        return first

    def _meet(self, face: tuple[int, int], number: int, plane: np.ndarray) -> None:
        if face not in self._open:
            self._open[face] = (number, plane)
            return
        other, there = self._open.pop(face)
        pairs = _pairs(plane, there)
        self._pairs.append(pairs - 1 + np.array([self.first[number], self.first[other]]))

    def merge(self, other: ComponentJoin) -> int:
        """Add the blocks of another accumulator; return what was added to its numbers."""
        shift = self.count
        self.count += other.count
        self.first.update({number: first + shift for number, first in other.first.items()})
        self._pairs += [pairs + shift for pairs in other._pairs]
        for face, (number, plane) in other._open.items():
            self._meet(face, number, plane)
        return shift

    def touching(self) -> np.ndarray:
        """Return the numbers of components of neighbouring blocks that are parts of the same one, int64 (n, 2)."""
        return np.concatenate([np.zeros((0, 2), np.int64), *self._pairs])

    def roots(self) -> np.ndarray:
        """Return for each number the smallest number of its component, int64 (count,).

        Raises:
            ValueError: a block is missing.
        """
        if len(self.first) < len(self.grid):
            raise ValueError(f"{len(self.first)} of {len(self.grid)} blocks were added")
        return roots_of(self.count, self._pairs)
