"""Finds the stored chunks of a zarr array at a URL: from the server's list, the shards' indices, or by requests."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from volumen.data.caching.index_cache import default_cache_dir, load_arrays, store_arrays
from volumen.data.formats.zarr_arrays.chunk_names import chunk_index
from volumen.data.formats.zarr_arrays.chunks import shard_form, stored_by_index
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

_CACHES = re.compile(r"^((simplecache|filecache|blockcache|cached)::)+")
"""Prefixes of caches, which would fetch and store whole files."""
_METADATA = (".zarray", "zarr.json")
_BATCH = 512
_MAX_SHARDS = 100_000
_MIN_PROBED = 4096
"""With fewer chunks, requesting each of them before it is read saves no time."""


def list_remote_chunks(url: str, ndim: int, bar: Any) -> np.ndarray | None:
    """List the files of an array at a URL.

    Args:
        url: URL of the array.
        ndim: number of axes of the array.
        bar: progress bar.

    Returns:
        (N, ndim) indices of the files of chunks or shards; None if the server returns no list. A response counts as a
        list only if it contains the array's metadata.
    """
    filesystem, root = _filesystem(url)
    found: list[tuple[int, ...]] = []
    pending, complete = [root], False
    while pending:
        folder = pending.pop()
        try:
            listed = filesystem.ls(folder, detail=True)
        except Exception:  # any response of a server that does not list files
            return None
        bar.update(len(listed))
        for item in listed:
            name = str(item["name"])
            parts = name.rstrip("/")[len(root) :].strip("/").split("/")
            complete |= len(parts) == 1 and parts[0] in _METADATA
            if item.get("type") == "directory":
                if parts[-1] == "c" or parts[-1].isdigit():
                    pending.append(name.rstrip("/") + "/" if name.endswith("/") else name)
                continue
            index = chunk_index(".".join(parts).split("."), ndim)
            if index is not None:
                found.append(index)
        if not complete:
            return None
    return np.array(found, np.int64).reshape(-1, ndim)


def read_remote_shards(
    url: str, array: Any, files: np.ndarray | None, bar: Any
) -> Iterator[tuple[list[int], np.ndarray]] | None:
    """Request the indices of shards.

    Args:
        url: URL of the array.
        array: the opened sharded array.
        files: (N, D) indices of the stored shards; None requests every shard.
        bar: progress bar, whose total is set.

    Returns:
        Yields the index of each stored shard and, flat, whether each of its chunks is stored; None if the form of the
        shards' indices is not known, or there are too many shards.
    """
    form = shard_form(array.metadata)
    grid = [-(-size // shard) for size, shard in zip(array.shape, array.shards)]
    if form is None or (files is None and prod(grid) > _MAX_SHARDS):
        return None
    shards = np.argwhere(np.ones(grid, bool)) if files is None else files
    bar.total = len(shards)
    start, stop = (-form.index_bytes, None) if form.at_end else (0, form.index_bytes)

    def read() -> Iterator[tuple[list[int], np.ndarray]]:
        for shard, data in _ranges(url, array, shards, start, stop):
            if data is not None:
                size = form.index_bytes
                yield shard, stored_by_index(data[-size:] if form.at_end else data[:size], form)
            else:
                bar.update()

    return read()


def probe_chunks(url: str, array: Any, fingerprint: str, bar: Any) -> np.ndarray | None:
    """Request the first byte of every chunk from a server that does not list files; the result is cached.

    Args:
        url: URL of the array.
        array: the opened array, without shards.
        fingerprint: a hash that changes with the array.
        bar: progress bar, whose total is set.

    Returns:
        (N, D) indices of the stored chunks; None if there are so few chunks that reading them is as fast.
    """
    grid = [-(-size // chunk) for size, chunk in zip(array.shape, array.chunks)]
    if prod(grid) < _MIN_PROBED:
        return None
    folder, key = default_cache_dir(), {"stored chunks of": fingerprint}
    known = None if folder is None else load_arrays(folder, key)
    if known is not None:
        return known["indices"]
    logger.warning(
        "%s: the server lists no files, so that each of %d chunks is asked for, once; a sharded zarr, or a copy on a"
        " disk, is faster",
        url,
        prod(grid),
    )
    bar.total = prod(grid)
    found: list[list[int]] = []
    for first in range(0, prod(grid), _BATCH):
        numbers = np.arange(first, min(first + _BATCH, prod(grid)))
        chunks = np.stack(np.unravel_index(numbers, grid), 1)
        found += [chunk for chunk, data in _ranges(url, array, chunks, 0, 1) if data is not None]
        bar.update(len(chunks))
    indices = np.array(found, np.int64).reshape(-1, len(grid))
    if folder is not None:
        store_arrays(folder, key, {"indices": indices})
    return indices


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(_CACHES.sub("", url))
    return filesystem, str(root).rstrip("/")


def _ranges(
    url: str, array: Any, indices: np.ndarray, start: int, stop: int | None
) -> Iterator[tuple[list[int], bytes | None]]:
    """Yield the index and the bytes of a part of each file, with parallel requests; None for a missing file.

    Raises:
        VolumenError: a request fails for another reason than a missing file.
    """
    filesystem, root = _filesystem(url)
    encode = array.metadata.encode_chunk_key
    for first in range(0, len(indices), _BATCH):
        batch: Sequence[list[int]] = indices[first : first + _BATCH].tolist()
        paths = [f"{root}/{encode(tuple(index))}" for index in batch]
        answers = filesystem.cat_ranges(paths, [start] * len(paths), [stop] * len(paths), on_error="return")
        for index, path, answer in zip(batch, paths, answers):
            if isinstance(answer, FileNotFoundError):
                yield index, None
            elif isinstance(answer, BaseException):
                reason = f"{type(answer).__name__}: {answer}"
                raise VolumenError(path, f"cannot be read ({reason})", remedy="check the URL and the network")
            else:
                yield index, answer
