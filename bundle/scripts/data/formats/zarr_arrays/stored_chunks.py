"""Which chunks of a zarr array exist on disk; absent ones hold the fill value and need not be decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from volumen.data.formats.integral import IntegralVolume
from volumen.data.formats.label_view import InvertedLabel, LabelView
from volumen.data.formats.zarr_arrays.volume import ZarrVolume


def stored_chunks(volume: Any) -> tuple[np.ndarray, tuple[int, ...]] | None:
    """Tell which blocks of a volume are stored, without reading any.

    Args:
        volume: any volume; only zarr arrays in a local folder can tell.

    Returns:
        A boolean array with one entry per block (False: holds 0 throughout) and the block's spatial shape,
        which is the chunk's or, for sharded arrays, the shard's. None if it is unknown or the fill value is
        not 0.
    """
    if isinstance(volume, InvertedLabel):
        return None  # what is not stored is foreground
    while isinstance(volume, IntegralVolume | LabelView):
        volume = volume.volume
    if not isinstance(volume, ZarrVolume):
        return None
    import zarr

    array = zarr.open(volume.path, mode="r")
    root = getattr(array.store, "root", None)
    if not isinstance(array, zarr.Array) or root is None or array.fill_value not in (0, None):
        return None
    blocks = tuple(getattr(array, "shards", None) or array.chunks)
    grid = np.zeros([-(-size // block) for size, block in zip(array.shape, blocks)], bool)
    folder = os.path.join(os.fspath(root), array.path)  # noqa: PTH118
    if not os.path.isdir(folder):  # noqa: PTH112
        return None
    for index in _chunk_indices(folder, grid.ndim):
        if all(i < n for i, n in zip(index, grid.shape)):
            grid[index] = True
    spatial = volume.axis_map.spatial
    kept = sorted(spatial)
    shadow = np.asarray(grid.any(axis=tuple(axis for axis in range(grid.ndim) if axis not in kept)))
    return shadow.transpose([kept.index(axis) for axis in spatial]), volume.axis_map.of_space(blocks)


def _chunk_indices(folder: str, ndim: int) -> Iterator[tuple[int, ...]]:
    """Yield the indices in the names of chunk files: c/0/1/2 or c.0.1.2 (v3), 0.1.2 or 0/1/2 (v2)."""
    for where, folders, files in os.walk(folder):
        relative = os.path.relpath(where, folder)
        head = [] if relative == os.curdir else relative.split(os.sep)  # noqa: PTH206
        if head and head[0] == "c":
            head = head[1:]
        for name in files:
            parts = [*head, *name.split(".")]
            parts = parts[1:] if parts[0] == "c" else parts
            if len(parts) == ndim and all(part.isdigit() for part in parts):
                yield tuple(int(part) for part in parts)
        folders[:] = [name for name in folders if name == "c" or name.isdigit()]
