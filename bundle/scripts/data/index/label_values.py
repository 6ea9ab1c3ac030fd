"""Finds the distinct values of a label, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import fingerprint_of
from volumen.data.caching.records import Records
from volumen.data.formats.volumes import Region, Volume
from volumen.data.formats.zarr_arrays.stored_chunks import stored_blocks
from volumen.utils.terminal.progress import grow
from volumen.utils.threads import in_threads

# Voxels per read: enough to amortise the cost of a read, and few enough for any memory.
_BLOCK_VOXELS = 1 << 22
# Values within such a range are counted in a table, which takes a tenth of the time of sorting them.
_TABLE = 1 << 16
# Voxels that are counted at once: the table needs eight bytes per voxel.
_PIECE = 1 << 18


def label_values(
    label: Volume,
    *,
    most: int = 4096,
    num_threads: int = 1,
    records: Records | None = None,
    bar: Any | None = None,
) -> tuple[int, ...]:
    """Return the distinct values of a label volume in ascending order.

    Chunks that are not stored are not read; each thread uses memory for a block of 4 million voxels.

    Args:
        label: an integer volume.
        most: stop after more values than this; a caller that looks for classes needs no more.
        num_threads: threads that read.
        records: records of "label values" that store the values until the label changes, or None.
        bar: progress bar whose total grows by the blocks to read, or None.

    Returns:
        Sorted values; incomplete if there are more than `most`.
    """
    key: dict[str, Any] = {}
    if records is not None and records.enabled:
        key = {"label values": fingerprint_of(label), "most": most}
        known = records.get(key)
        if known is not None:
            return tuple(int(value) for value in known["values"])
    regions, absent = stored_regions(label)
    values = {int(value) for value in absent}
    if bar is not None:
        grow(bar, len(regions))
    with BLOCKS.paused():  # a region consists of whole chunks, so each chunk is read once
        for found in in_threads(lambda region: _values_of(label.read(region)), regions, num_threads):
            values |= found
            if bar is not None:
                bar.update()
            if len(values) > most:
                break
    if records is not None:
        signed = min(values, default=0) < 0
        records.put(key, {"values": np.array(sorted(values), np.int64 if signed else np.uint64)})
    return tuple(sorted(values))


def _values_of(block: np.ndarray) -> set[int]:
    if block.dtype == np.bool_:
        block = block.view(np.uint8)
    low, high = int(block.min()), int(block.max())
    if high - low < _TABLE:
        # A value beyond the signed type wraps around, and is correct again in the unsigned type of the same size.
        flat = block.ravel()
        present = np.zeros(high - low + 1, bool)
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE] - block.dtype.type(low)
            present[piece.view(f"u{block.dtype.itemsize}").astype(np.intp)] = True
        return {low + int(offset) for offset in np.flatnonzero(present)}
    return {int(value) for value in np.unique(block)}


def stored_regions(volume: Volume) -> tuple[Blocks, set[float]]:
    """Return the blocks that must be read, and the values of all other blocks, which are known without reading."""
    size = _block_size(volume.shape, volume.chunks)
    known = stored_blocks(volume)
    if known is None:
        return Blocks(volume.shape, size), set()
    stored = Blocks(volume.shape, size, known.tiles(size))
    whole = len(stored) == len(Blocks(volume.shape, size))
    return stored, set() if whole else {known.fill}


class Blocks(Sequence[Region]):
    """Boxes of a regular grid over a volume, in C order; a list of all of them may not fit in memory.

    Args:
        shape: spatial shape of the volume.
        size: voxels per axis of a box.
        chosen: (N, D) indices of the boxes; None: all.
    """

    def __init__(self, shape: tuple[int, ...], size: Sequence[int], chosen: np.ndarray | None = None) -> None:
        self.shape = shape
        self.size = tuple(size)
        self.grid = tuple(-(-extent // step) for extent, step in zip(shape, size))
        self.chosen = chosen

    def __len__(self) -> int:
        return math.prod(self.grid) if self.chosen is None else len(self.chosen)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(len(self))[number]]
        if not 0 <= number < len(self):
            raise IndexError(number)
        index = np.unravel_index(number, self.grid) if self.chosen is None else self.chosen[number]
        return tuple(
            slice(int(i) * step, min((int(i) + 1) * step, extent))
            for i, step, extent in zip(index, self.size, self.shape)
        )


def storage_blocks(
    shape: tuple[int, ...], chunks: tuple[int, ...], voxels: int = _BLOCK_VOXELS
) -> Iterator[Region]:
    """Cut a volume into boxes made of whole storage chunks, each of at most about `voxels` voxels.

    Args:
        shape: spatial shape.
        chunks: storage chunk per axis.
        voxels: largest box, unless one chunk alone is larger.

    Yields:
        A tuple of slices per box, in C order.
    """
    yield from Blocks(shape, _block_size(shape, chunks, voxels))


def _block_size(
    shape: tuple[int, ...], chunks: tuple[int, ...], voxels: int = _BLOCK_VOXELS
) -> tuple[int, ...]:
    size = [min(chunk, extent) for chunk, extent in zip(chunks, shape)]
    for axis in reversed(range(len(shape))):
        # Grow along the fastest axis first, so that a box is contiguous in most files.
        room = voxels // max(1, math.prod(size))
        if room <= 1:
            break
        size[axis] = min(shape[axis], size[axis] * room)
    return tuple(size)
