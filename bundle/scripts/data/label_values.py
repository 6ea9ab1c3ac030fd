"""The distinct values of a label, read block by block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from scripts.data.volumes import Volume

# Voxels read at once: large enough to amortise a read, small enough for any memory.
_BLOCK_VOXELS = 1 << 24


def label_values(label: Volume, *, most: int = 4096) -> tuple[int, ...]:
    """Return the distinct values of a label volume, in order.

    Args:
        label: an integer volume.
        most: stop once more values than this are found; a caller that looks for classes needs no more.

    Returns:
        Sorted values, possibly cut short after `most`.
    """
    values: set[int] = set()
    for region in storage_blocks(label.shape, label.chunks):
        block = label.read(region)
        if block.dtype == np.uint8 or block.dtype == np.bool_:
            found = np.flatnonzero(np.bincount(block.ravel().view(np.uint8), minlength=1))
        else:
            found = np.unique(block)
        values.update(int(value) for value in found)
        if len(values) > most:
            break
    return tuple(sorted(values))


def storage_blocks(
    shape: tuple[int, ...], chunks: tuple[int, ...], voxels: int = _BLOCK_VOXELS
) -> Iterator[tuple[slice, ...]]:
    """Cut a volume into boxes made of whole storage chunks, each of at most about `voxels` voxels.

    Args:
        shape: spatial shape.
        chunks: storage chunk per axis.
        voxels: largest box, unless one chunk alone is larger.

    Yields:
        A tuple of slices per box, in C order.
    """
    size = [min(chunk, extent) for chunk, extent in zip(chunks, shape)]
    for axis in reversed(range(len(shape))):
        # Grow along the fastest axis first, so that a box is contiguous in most files.
        room = voxels // max(1, int(np.prod(size)))
        if room <= 1:
            break
        size[axis] = min(shape[axis], size[axis] * room)
    starts = [range(0, extent, step) for extent, step in zip(shape, size)]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, extent)) for start, step, extent in zip(corner, size, shape)
        )
