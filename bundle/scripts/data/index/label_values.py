"""The distinct values of a label, read block by block."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from volumen.data.formats.volumes import Region, Volume
from volumen.data.formats.zarr_arrays.stored_chunks import stored_chunks
from volumen.data.index_cache import load_arrays, store_arrays
from volumen.utils.progress import hidden
from volumen.utils.threads import in_threads

# Voxels read at once: large enough to amortise a read, small enough for any memory.
_BLOCK_VOXELS = 1 << 22
# Values this close together are counted in a table, which takes a tenth of the time of sorting them.
_TABLE = 1 << 16


def label_values(
    label: Volume,
    *,
    most: int = 4096,
    num_threads: int = 1,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> tuple[int, ...]:
    """Return the distinct values of a label volume, in order.

    Chunks that are not stored are not read; memory is that of a block of 4 million voxels per thread.

    Args:
        label: an integer volume.
        most: stop once more values than this are found; a caller that looks for classes needs no more.
        num_threads: threads that read.
        cache_dir: folder in which the values are kept until the label changes, or None.
        progress: show a progress bar.

    Returns:
        Sorted values, possibly cut short after `most`.
    """
    from tqdm import tqdm

    key = {"label values": label.fingerprint(), "most": most} if cache_dir is not None else {}
    kept = load_arrays(Path(cache_dir), key) if cache_dir is not None else None
    if kept is not None:
        return tuple(int(value) for value in kept["values"])
    regions, values = stored_regions(label)
    with tqdm(
        total=len(regions), desc="label values", unit="block", disable=hidden(progress), leave=False
    ) as bar:
        for found in in_threads(lambda region: _values_of(label.read(region)), regions, num_threads):
            values |= found
            bar.update()
            if len(values) > most:
                break
    if cache_dir is not None:
        signed = min(values, default=0) < 0
        array = np.array(sorted(values), np.int64 if signed else np.uint64)
        store_arrays(Path(cache_dir), key, {"values": array})
    return tuple(sorted(values))


def _values_of(block: np.ndarray) -> set[int]:
    if block.dtype == np.bool_:
        block = block.view(np.uint8)
    low, high = int(block.min()), int(block.max())
    if high - low < _TABLE:
        # What a signed type cannot hold wraps around, and is right again as an unsigned one of its size.
        offsets = (block - block.dtype.type(low)).view(f"u{block.dtype.itemsize}")
        counts = np.bincount(offsets.ravel().astype(np.intp, copy=False))
        return {low + int(offset) for offset in np.flatnonzero(counts)}
    return {int(value) for value in np.unique(block)}


def stored_regions(label: Volume) -> tuple[list[Region], set[int]]:
    """Return the blocks that may hold something, and the values known without reading: 0 for the others."""
    regions = list(storage_blocks(label.shape, label.chunks))
    known = stored_chunks(label)
    if known is None:
        return regions, set()
    grid, blocks = known
    stored = [
        region
        for region in regions
        if grid[tuple(slice(p.start // b, -(-p.stop // b)) for p, b in zip(region, blocks))].any()
    ]
    return stored, set() if len(stored) == len(regions) else {0}


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
