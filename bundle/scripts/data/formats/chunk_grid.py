"""Assembles regions from the chunks of a regular grid, for formats whose chunks are separate blobs of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import product

import numpy as np

from volumen.data.caching.block_cache import BLOCKS

Region = tuple[slice, ...]
ChunkLoader = Callable[[tuple[int, ...]], np.ndarray | None]


def read_chunks(
    region: Region,
    chunks: tuple[int, ...],
    dtype: np.dtype,
    load: ChunkLoader,
    key: Callable[[tuple[int, ...]], Hashable],
    fill: float = 0,
) -> np.ndarray:
    """Return a region.

    Args:
        region: one slice per stored axis, inside the array.
        chunks: shape of a chunk.
        dtype: type of the result.
        load: returns the decoded chunk of an index, or None if it is not stored; a chunk at the end of an axis may be
            shorter.
        key: returns the name of a chunk in the block cache, which changes with its content.
        fill: value of the voxels of chunks that are not stored.
    """
    out = np.full([part.stop - part.start for part in region], fill, dtype)
    spans = [range(part.start // size, -(-part.stop // size)) for part, size in zip(region, chunks)]
    for index in product(*spans):
        name = key(index)
        block = BLOCKS.find(name)
        if block is None:
            block = load(index)
            if block is None:
                continue
            BLOCKS.keep(name, block)
        inside, outside = [], []
        for i, size, part in zip(index, chunks, region):
            low, high = max(part.start, i * size), min(part.stop, (i + 1) * size)
            inside.append(slice(low - i * size, high - i * size))
            outside.append(slice(low - part.start, high - part.start))
        out[tuple(outside)] = block[tuple(inside)]
    return out
