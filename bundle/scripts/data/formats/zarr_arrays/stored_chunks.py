"""Finds the stored chunks of a zarr array; the others contain the fill value and need not be read.

A volume of a scroll has millions of chunks, of which a label stores only a few. The stored ones are therefore listed
once, from file names or from the indices of shards, and only they are processed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from volumen.data.formats.integral import IntegralVolume
from volumen.data.formats.label_view import InvertedLabel, LabelView
from volumen.data.formats.urls import is_url
from volumen.data.formats.zarr_arrays.chunk_names import chunk_index
from volumen.data.formats.zarr_arrays.chunks import ChunkReader
from volumen.data.formats.zarr_arrays.remote_listing import (
    list_remote_chunks,
    probe_chunks,
    read_remote_shards,
)
from volumen.data.formats.zarr_arrays.volume import ZarrVolume
from volumen.utils.boxes import cells_in_ranges
from volumen.utils.terminal.progress import growing_bar

Region = tuple[slice, ...]


@dataclass(frozen=True)
class StoredBlocks:
    """The stored blocks of a volume.

    Attributes:
        shape: spatial shape of the volume.
        block: spatial shape of a block.
        indices: (N, D) index of each stored block, in lexicographic order, without repetition.
        fill: value of all voxels in blocks that are not stored.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    indices: np.ndarray
    fill: float

    @property
    def total(self) -> int:
        """Number of blocks of the whole volume, stored or not."""
        return prod(-(-size // block) for size, block in zip(self.shape, self.block))

    def tiles(self, tile: Sequence[int]) -> np.ndarray:
        """Return the tiles of another regular grid that overlap a stored block.

        Args:
            tile: voxels per axis of a tile.

        Returns:
            (M, D) indices in lexicographic order, without repetition.
        """
        size = np.array(tile)
        return cells_in_ranges(self.starts // size, (self.stops - 1) // size)

    def cells(self, edges: Sequence[np.ndarray]) -> np.ndarray:
        """Return the cells of a grid, which need not be regular, that overlap a stored block.

        Args:
            edges: per axis, ascending; cell i spans edges[i] to edges[i + 1].

        Returns:
            (M, D) indices in lexicographic order, without repetition.
        """
        first, last = [], []
        for axis, axis_edges in enumerate(edges):
            low = np.searchsorted(axis_edges, self.starts[:, axis], side="right") - 1
            high = np.searchsorted(axis_edges, self.stops[:, axis], side="left") - 1
            first.append(np.maximum(low, 0))
            last.append(np.minimum(high, len(axis_edges) - 2))
        return cells_in_ranges(np.stack(first, 1), np.stack(last, 1))

    @property
    def starts(self) -> np.ndarray:
        """First voxel of each stored block, (N, D)."""
        return self.indices * np.array(self.block)

    @property
    def stops(self) -> np.ndarray:
        """One past the last voxel of each stored block, (N, D)."""
        return np.minimum(self.starts + np.array(self.block), self.shape)


_CACHE: WeakKeyDictionary[ZarrVolume, dict[tuple[bool, bool], StoredBlocks | None]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def stored_blocks(volume: Any, *, inside_shards: bool = True, probe: bool = True) -> StoredBlocks | None:
    """List the stored blocks of a volume, once for each opened volume, without reading voxels.

    Args:
        volume: any volume. The stored blocks are known of zarr arrays in a local folder, of those at a URL whose server
            lists its files, and of sharded arrays on any server, from the indices of the shards.
        inside_shards: return the chunks of sharded arrays rather than the shards.
        probe: request each chunk from a server that neither lists files nor stores shards.

    Returns:
        The blocks (chunks or shards); None if they are not known.
    """
    if isinstance(volume, InvertedLabel):
        return None  # blocks that are not stored are foreground
    while isinstance(volume, IntegralVolume | LabelView):
        volume = volume.volume
    if not isinstance(volume, ZarrVolume):
        return None
    with _LOCK:
        known = _CACHE.setdefault(volume, {})
        key = inside_shards, probe
        if key not in known:
            known[key] = _list(volume, inside_shards, probe)
        return known[key]


def absent_everywhere_but(volume: Any, *values: float | None) -> StoredBlocks | None:
    """Return the stored blocks if all other blocks have one of some values; None if this is not known."""
    blocks = stored_blocks(volume)
    return blocks if blocks is not None and blocks.fill in values else None


def _list(volume: ZarrVolume, inside_shards: bool, probe: bool) -> StoredBlocks | None:
    array, reader = volume.handle
    fill = 0 if array.fill_value is None else float(array.fill_value)
    shards = getattr(array, "shards", None)
    outer = tuple(shards or array.chunks)
    with growing_bar("stored chunks", "file") as bar:
        if is_url(volume.path):
            files = list_remote_chunks(volume.path, len(outer), bar)
            if files is None and not shards and probe:
                files = probe_chunks(volume.path, array, volume.fingerprint(), bar)
        else:
            files = _local_files(array, bar)
        block = outer
        if shards and inside_shards:
            found = _chunks_in_shards(volume, array, reader, files, bar)
            files, block = (files, outer) if found is None else (found, tuple(array.chunks))
    if files is None:
        return None
    grid = [-(-size // extent) for size, extent in zip(array.shape, block)]
    files = files[(files < grid).all(axis=1)]
    spatial = volume.axis_map.spatial
    indices = np.unique(files[:, list(spatial)], axis=0)
    return StoredBlocks(volume.shape, volume.axis_map.of_space(block), indices, fill)


def _local_files(array: Any, bar: Any) -> np.ndarray | None:
    root = getattr(array.store, "root", None)
    folder = None if root is None else os.path.join(os.fspath(root), array.path)  # noqa: PTH118
    if folder is None or not os.path.isdir(folder):  # noqa: PTH112
        return None
    return _table(_chunk_indices(folder, len(array.shape), bar), len(array.shape))


def _chunks_in_shards(
    volume: ZarrVolume, array: Any, reader: ChunkReader | None, files: np.ndarray | None, bar: Any
) -> np.ndarray | None:
    """Return the indices of the chunks in all shards; None if the form of the shards' indices is not known."""
    inner = np.array([outer // chunk for outer, chunk in zip(array.shards, array.chunks)])
    if is_url(volume.path):
        found = read_remote_shards(volume.path, array, files, bar)
    elif reader is not None and files is not None:
        found = ((shard, reader.stored_in_shard(tuple(shard))) for shard in files.tolist())
    else:
        found = None
    if found is None:
        return None
    parts = [np.zeros((0, len(inner)), np.int64)]
    for shard, stored in found:
        bar.update()
        parts.append(np.argwhere(stored.reshape(inner)) + np.array(shard) * inner)
    return np.concatenate(parts)


def _table(indices: Iterator[tuple[int, ...]], ndim: int) -> np.ndarray:
    flat = np.fromiter((number for index in indices for number in index), np.int64)
    return flat.reshape(-1, ndim)


def _chunk_indices(folder: str, ndim: int, bar: Any) -> Iterator[tuple[int, ...]]:
    """Yield the chunk indices in the file names: c/0/1/2 or c.0.1.2 (v3), 0.1.2 or 0/1/2 (v2)."""
    for where, folders, files in os.walk(folder):
        relative = os.path.relpath(where, folder)
        head = [] if relative == os.curdir else relative.split(os.sep)  # noqa: PTH206
        for name in files:
            index = chunk_index([*head, *name.split(".")], ndim)
            if index is not None:
                yield index
        folders[:] = [name for name in folders if name == "c" or name.isdigit()]
        bar.update(len(files))
