"""Writes and reads the chunks of a prediction without zarr's event loop and threads.

A chunk is one file of a zarr v3 array with regular chunks, default keys and at most one compressor. Files are written
atomically. A chunk of zeros, the fill value, has no file.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from volumen.data.formats.zarr_arrays.chunk_names import chunk_index

Region = tuple[slice, ...]

UNFINISHED_CHUNK = "*.partial"
"""Pattern of the names of incomplete chunks, which a killed process leaves."""


class ChunkFiles:
    """The chunks of one array; threads and processes may write different chunks at once.

    Args:
        folder: the array's folder.
        shape: shape of the array.
        chunks: shape of a chunk.
        dtype: type of the values, little-endian on disk.
        codec: numcodecs codec that compresses a chunk, or None.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype,
        codec: Any = None,
    ) -> None:
        self._folder, self._shape, self._chunks = str(folder), shape, chunks
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._codec = codec
        self._folders: set[str] = set()

    def write(self, region: Region, values: np.ndarray) -> None:
        """Write a region; in chunks that it covers partly, other voxels do not change."""
        for index, inside, outside in self._parts(region):
            part = values[outside]
            bounds = tuple(
                min(c, n - i * c) for i, c, n in zip(index, self._chunks, self._shape, strict=True)
            )
            if part.shape == self._chunks:
                chunk = np.ascontiguousarray(part, dtype=self._dtype)
            else:
                chunk = np.zeros(self._chunks, self._dtype) if part.shape == bounds else self._get(index)
                chunk[inside] = part
            self._put(index, chunk)

    def read(self, region: Region) -> np.ndarray:
        """Return a region."""
        result = np.zeros([part.stop - part.start for part in region], self._dtype)
        for index, inside, outside in self._parts(region):
            if os.path.exists(self._path(index)):  # noqa: PTH110  (once per chunk)
                result[outside] = self._get(index)[inside]
        return result.astype(self._dtype.newbyteorder("="), copy=False)

    def stored(self) -> Iterator[tuple[int, ...]]:
        """Yield the index of every chunk that has a file."""
        root = os.path.join(self._folder, "c")  # noqa: PTH118
        for where, _, files in os.walk(root):
            head = [] if where == root else os.path.relpath(where, root).split(os.sep)  # noqa: PTH206
            for name in files:
                index = chunk_index([*head, name], len(self._shape))
                if index is not None:
                    yield index

    def _parts(self, region: Region) -> Iterator[tuple[tuple[int, ...], Region, Region]]:
        """Yield every chunk of a region: its index, the slices in the chunk, and the slices in the region."""
        grids = [range(p.start // c, -(-p.stop // c)) for p, c in zip(region, self._chunks, strict=True)]
        for index in itertools.product(*grids):
            inside, outside = [], []
            for i, c, part in zip(index, self._chunks, region, strict=True):
                low, high = max(part.start, i * c), min(part.stop, (i + 1) * c)
                inside.append(slice(low - i * c, high - i * c))
                outside.append(slice(low - part.start, high - part.start))
            yield index, tuple(inside), tuple(outside)

    def _path(self, index: tuple[int, ...]) -> str:
        return f"{self._folder}/c/{'/'.join(map(str, index))}"

    def _get(self, index: tuple[int, ...]) -> np.ndarray:
        """Return a writable chunk; zeros if there is no file."""
        try:
            with open(self._path(index), "rb", buffering=0) as stream:  # noqa: PTH123
                data: Any = stream.read()
        except FileNotFoundError:
            return np.zeros(self._chunks, self._dtype)
        if self._codec is not None:
            data = self._codec.decode(data)
        return np.frombuffer(data, self._dtype).reshape(self._chunks).copy()

    def _put(self, index: tuple[int, ...], chunk: np.ndarray) -> None:
        path = self._path(index)
        if not chunk.any():
            Path(path).unlink(missing_ok=True)
            return
        data = chunk.data.cast("B") if self._codec is None else self._codec.encode(chunk)
        folder = path.rpartition("/")[0]
        if folder not in self._folders:
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            self._folders.add(folder)
        partial = f"{path}.{uuid4().hex}.partial"
        try:
            with open(partial, "wb", buffering=0) as stream:  # noqa: PTH123
                view = memoryview(data).cast("B")
                while view:
                    view = view[stream.write(view) :]
            os.replace(partial, path)  # noqa: PTH105
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def numcodec(name: str, dtype: np.dtype) -> Any:
    """Return the numcodecs codec of a compression, as `zarr_codec` describes it in an array's metadata."""
    import numcodecs

    if name == "none":
        return None
    if name == "gzip":
        return numcodecs.GZip(level=5)
    shuffle = numcodecs.Blosc.BITSHUFFLE if dtype.itemsize > 1 else numcodecs.Blosc.NOSHUFFLE
    return numcodecs.Blosc(cname=name, clevel=3, shuffle=shuffle)


def zarr_codec(name: str, dtype: np.dtype) -> Any:
    """Return zarr's codec of a compression, None for none."""
    from zarr.codecs import BloscCodec, GzipCodec

    if name == "none":
        return None
    if name == "gzip":
        return GzipCodec(level=5)
    settings: dict[str, Any] = {"cname": name, "shuffle": "bitshuffle" if dtype.itemsize > 1 else "noshuffle"}
    return BloscCodec(clevel=3, typesize=dtype.itemsize, **settings)
