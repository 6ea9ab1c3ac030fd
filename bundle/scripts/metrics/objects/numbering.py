"""The number of the object at every voxel, computed again for the region that a picture or a search looks at."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from volumen.metrics.grid import BlockGrid, Region, inside
from volumen.metrics.topology.components import ComponentJoin, label_components
from volumen.metrics.topology.counts import Connectivity, neighbours_of

OTHER = -1
"""Stands for all objects whose number was not kept."""

Masks = Callable[[Region], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Gives prediction, truth and known voxels, each bool (Z, Y, X), of a region of the volume."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of one mask's components.

    Args:
        first: block to the number, from 0 over the volume, of its first component.
        parts: int64 (n,), ascending: the components in blocks whose object is known.
        objects: int64 (n,), the number of the object of each, from 1.
    """

    first: dict[int, int]
    parts: np.ndarray
    objects: np.ndarray

    @classmethod
    def of(cls, join: ComponentJoin, roots: np.ndarray) -> Numbers:
        """Return the numbers of all components.

        Args:
            join: numbers of the components in blocks.
            roots: joined number of each, from 0.
        """
        return cls(join.first, np.arange(len(roots)), roots + 1)

    def only(self, wanted: Collection[int]) -> Numbers:
        """Return the numbers of some objects; all others become `OTHER`."""
        kept = np.isin(self.objects, np.fromiter(wanted, np.int64, len(wanted)))
        return Numbers(self.first, self.parts[kept], self.objects[kept])

    def of_block(self, number: int, labels: np.ndarray) -> np.ndarray:
        """Return the objects of a block's voxels, int64, from its components, which are numbered from 1."""
        highest = int(labels.max(initial=0))
        table = np.full(highest + 1, OTHER, np.int64)
        table[0] = 0
        start = self.first[number]
        low, high = np.searchsorted(self.parts, [start, start + highest])
        table[self.parts[low:high] - start + 1] = self.objects[low:high]
        return table[labels]


@dataclass(frozen=True)
class ObjectNumbers:
    """The objects of prediction and truth in one class of one volume.

    Blocks are labelled again where a region touches them, exactly as they were when they were scored.

    Args:
        grid: the blocks.
        connectivity: neighbourhoods of foreground and background.
        pred: numbers of predicted objects.
        truth: numbers of true objects.
    """

    grid: BlockGrid
    connectivity: Connectivity
    pred: Numbers
    truth: Numbers

    def only(self, pred: Collection[int], truth: Collection[int]) -> ObjectNumbers:
        """Return the numbers of some objects, which take far less memory; all others become `OTHER`."""
        return ObjectNumbers(self.grid, self.connectivity, self.pred.only(pred), self.truth.only(truth))

    def read(self, region: Region, masks: Masks) -> tuple[np.ndarray, np.ndarray]:
        """Return predicted and true objects at every voxel of a region, int64 (Z, Y, X), 0 for none.

        Args:
            region: where.
            masks: gives the masks that were scored.
        """
        shape = tuple(part.stop - part.start for part in region)
        found, wanted = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number in self._blocks(region):
            box = self.grid.box(number)
            wide = self.grid.around(box, 0, 1)
            pred, truth, known = masks(wide)
            both = tuple(
                slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, region, strict=True)
            )
            for out, mask, numbers in ((found, pred, self.pred), (wanted, truth, self.truth)):
                labels, _ = label_components(mask & known, neighbours_of(self.connectivity)[0])
                out[inside(both, region)] = numbers.of_block(number, labels)[inside(both, wide)]
        return found, wanted

    def _blocks(self, region: Region) -> list[int]:
        """Return the blocks that a region touches."""
        ranges = [
            range(part.start // size, -(-part.stop // size))
            for part, size in zip(region, self.grid.block, strict=True)
        ]
        grid = np.meshgrid(*ranges, indexing="ij")
        return [int(i) for i in np.ravel_multi_index(grid, self.grid.counts).reshape(-1)]
