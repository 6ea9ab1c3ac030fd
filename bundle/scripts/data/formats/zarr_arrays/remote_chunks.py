"""Regions of a zarr array at a URL, chunk by chunk, so that a chunk travels once."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import product
from typing import Any

import numpy as np

from volumen.data.caching.block_cache import BLOCKS

Region = tuple[slice, ...]


def fetch_region(array: Any, region: Region, key: Hashable) -> np.ndarray:
    """Read a region; the chunks that are not kept come by one request, which zarr spreads over connections.

    Args:
        array: an open zarr array; its chunks are taken not to change while the process runs.
        region: slices of the stored array, with unit step.
        key: what tells this array from others in the block cache.
    """
    kept: dict[tuple[int, ...], np.ndarray] = {}
    missing: list[Region] = []
    chunks = chunks_in(region, array.chunks, array.shape)
    for chunk in chunks:
        block = BLOCKS.find((key, _corner(chunk)))
        if block is None:
            missing.append(chunk)
        else:
            kept[_corner(chunk)] = block
    if missing:
        box = tuple(slice(min(p.start for p in parts), max(p.stop for p in parts)) for parts in zip(*missing))
        fetched = np.asarray(array[box])
        for chunk in missing:
            block = fetched[_shift(chunk, _corner(box))].copy()
            BLOCKS.keep((key, _corner(chunk)), block)
            kept[_corner(chunk)] = block
    out = np.empty([part.stop - part.start for part in region], array.dtype)
    for chunk in chunks:
        shared = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(region, chunk))
        out[_shift(shared, _corner(region))] = kept[_corner(chunk)][_shift(shared, _corner(chunk))]
    return out


def chunks_in(region: Region, chunks: tuple[int, ...], shape: tuple[int, ...]) -> list[Region]:
    """List the chunks of a regular grid that a region touches, each as slices of the array."""
    per_axis = []
    for part, chunk, size in zip(region, chunks, shape):
        span = range(part.start // chunk, -(-part.stop // chunk))
        per_axis.append([slice(i * chunk, min((i + 1) * chunk, size)) for i in span])
    return [tuple(parts) for parts in product(*per_axis)]


def _corner(region: Region) -> tuple[int, ...]:
    return tuple(part.start for part in region)


def _shift(region: Region, origin: tuple[int, ...]) -> Region:
    return tuple(slice(part.start - start, part.stop - start) for part, start in zip(region, origin))
