"""Segments instances of volumes larger than memory, block by block with context, and joins them by overlap.

Two neighbouring blocks both segment the two planes of voxels at their common face, one with its own voxels, the
other with its halo. Two instances are the same if, on these planes, each contains more than half of the other's
voxels. Such pairs are joined by union-find. An instance can therefore have at most one partner at a face: an error in
one block cannot merge instances that the other block separates.

Every finished block writes a small file with its counts and planes, so that an interrupted run can continue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from volumen.derived.distance_window import surroundings
from volumen.inference.postprocess.block_files import BlockFiles
from volumen.inference.postprocess.blocks import Region, block_box, block_counts, neighbours
from volumen.inference.postprocess.instances import renumber
from volumen.utils.connected import roots_of

Segment = Callable[[Region], np.ndarray]
Read = Callable[[Region], np.ndarray]
Write = Callable[[Region, np.ndarray], None]


@dataclass(frozen=True)
class Stitching:
    """The blocks of a volume, and the steps from a segmentation per block to one of the whole volume.

    `segment` segments each block, `join` joins the instances of all blocks, `numbered` returns the final numbers of
    each block. With a single block, the result is the segmentation of the whole volume.

    Args:
        shape: shape of the volume.
        block: shape of a block.
        halo: context per axis, at least 1.
        files: the files of finished blocks.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    halo: Sequence[int]
    files: BlockFiles

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.prod(self._counts)

    @property
    def _counts(self) -> tuple[int, ...]:
        return block_counts(self.shape, self.block)

    def segment(
        self, number: int, segment: Segment, write: Write, raise_if_cancelled: Callable[[], None]
    ) -> None:
        """Segment a block unless it is finished.

        Args:
            number: number of the block.
            segment: returns the instances of a region, 0 for none.
            write: writes the numbers of a region, which are unique within the block only, uint32.
            raise_if_cancelled: called before anything is written.
        """
        if self.files.has(number):
            return
        box = block_box(number, self.shape, self.block)
        labels, properties = _segment_block(segment, box, self.shape, self.halo)
        raise_if_cancelled()
        write(box, labels)
        self.files.save(number, properties)

    def join(self, min_size: int = 0) -> int:
        """Join the instances of all blocks, number them from 1 without a gap, and return their count.

        Args:
            min_size: instances of fewer voxels are removed.
        """
        offsets, numbers = _join_blocks(self.files, self._counts, min_size)
        self.files.save_table(offsets, numbers)
        return int(numbers.max(initial=0))

    def numbered(self, number: int, read: Read) -> tuple[Region, np.ndarray]:
        """Return the region of a block and its final numbers, uint32.

        Args:
            number: number of the block.
            read: reads the numbers that `segment` wrote.
        """
        box = block_box(number, self.shape, self.block)
        table = np.concatenate([np.zeros(1, np.uint32), self.files.table(number)])
        return box, table[read(box)]


def _segment_block(
    segment: Segment, box: Region, shape: tuple[int, ...], halo: Sequence[int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the numbers of a block, with the sizes of its instances and the instances on both planes of each face."""
    outer, inner = surroundings(shape, box, halo)
    found = segment(outer)
    labels, count = renumber(found[inner])
    # By number in block and halo, the number in the block: 0 for instances that lie in the halo only.
    own = np.zeros(int(found.max(initial=0)) + 1, np.uint32)
    own[found[inner]] = labels
    planes = {}
    for axis, part in enumerate(box):
        for side, at in (("low", part.start), ("high", part.stop)):
            if 0 < at < shape[axis]:
                pair = list(inner)
                pair[axis] = slice(at - 1 - outer[axis].start, at + 1 - outer[axis].start)
                planes[f"{side}{axis}"] = own[found[tuple(pair)]]
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    return labels, {"sizes": sizes, **planes}


def _join_blocks(files: BlockFiles, counts: tuple[int, ...], min_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first number of each block, and by number the final number, uint32 (0 for small instances)."""
    blocks = math.prod(counts)
    offsets, sizes = np.zeros(blocks + 1, np.int64), [np.zeros(0)]
    for number in range(blocks):
        sizes.append(files.load(number, "sizes")["sizes"])
        offsets[number + 1] = offsets[number] + len(sizes[-1])
    pairs = []
    for number, before, axis in neighbours(counts):
        one, other = files.load(before, f"high{axis}"), files.load(number, f"low{axis}")
        found = _partners(one[f"high{axis}"], other[f"low{axis}"])
        pairs.append(found + np.array([[offsets[before], offsets[number]]]))
    total = int(offsets[-1])
    root = roots_of(total, pairs) if total else np.zeros(0, np.int64)
    size = np.bincount(root, weights=np.concatenate(sizes), minlength=total)
    large = np.flatnonzero((size > 0) & (size >= min_size))
    final = np.zeros(total, np.uint32)
    final[large] = np.arange(1, len(large) + 1)
    return offsets, final[root]


def _partners(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return pairs of instances, counted from 0, of which each contains more than half of the other: (pairs, 2)."""
    a, b = one.reshape(-1).astype(np.int64), other.reshape(-1).astype(np.int64)
    of_a, of_b = np.bincount(a), np.bincount(b)
    both = (a > 0) & (b > 0)
    pairs, shared = np.unique(np.stack([a[both], b[both]], axis=1), axis=0, return_counts=True)
    good = (2 * shared > of_a[pairs[:, 0]]) & (2 * shared > of_b[pairs[:, 1]])
    return pairs[good] - 1
