"""Reads neuroglancer's precomputed volumes chunk by chunk, on disk or at a URL."""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import digest
from volumen.data.formats.axes import AxisMap
from volumen.data.formats.byte_store import ByteStore, read_json
from volumen.data.formats.chunk_grid import read_chunks
from volumen.data.formats.precomputed.info import INFO, Info, Scale, parse_info
from volumen.data.formats.precomputed.segmentation_codec import decode_segmentation
from volumen.data.formats.precomputed.shards import chunk_number, read_minishard, unpack
from volumen.data.formats.urls import is_url
from volumen.data.formats.volumes import LazyVolume, Region, SingleLevelError
from volumen.data.space.geometry import stated_geometry
from volumen.utils.errors import VolumenError, file_fault

_COMPRESSED = ".gz"
"""Suffix that cloud-volume gives to compressed chunks on disk."""


class PrecomputedVolume(LazyVolume):
    """A scale of a precomputed volume, read as (channels, Z, Y, X); chunks that are not stored read as 0.

    Args:
        path: folder or URL of the volume.
        info: its description.
        scale: the scale.
        first: the finest scale.
        axis_map: its axes (C, Z, Y, X).
    """

    def __init__(self, path: str, info: Info, scale: Scale, first: Scale, axis_map: AxisMap) -> None:
        self._info, self._scale = info, scale
        self._chunks = (info.channels, *scale.chunk[::-1])
        ndim = len(axis_map.shape)
        # The centre of a coarse voxel lies between the centres of the voxels that it covers.
        origin = [
            offset * size + (size - finest) / 2
            for offset, size, finest in zip(scale.offset, scale.resolution, first.resolution, strict=True)
        ]
        geometry = stated_geometry(
            scale.resolution[::-1][-ndim:], "nanometer", origin=tuple(origin[::-1][-ndim:])
        )
        super().__init__(
            path, axis_map, info.dtype, geometry=geometry, chunks=axis_map.of_space(self._chunks)
        )

    def _open(self) -> ByteStore:
        return ByteStore(self.path)

    def _read_stored(self, region: Region) -> np.ndarray:
        return read_chunks(region, self._chunks, self.dtype, self._load, self._key)

    def _file(self, index: tuple[int, ...]) -> str:
        """Return the file that holds a chunk; `index` is (C, Z, Y, X)."""
        xyz, sharding = index[:0:-1], self._scale.sharding
        if sharding is None:
            return f"{self._scale.key}/{self._scale.chunk_name(xyz)}"
        shard, _ = sharding.place(chunk_number(xyz, self._scale.grid))
        return f"{self._scale.key}/{sharding.file_name(shard)}"

    def _key(self, index: tuple[int, ...]) -> tuple[Any, ...]:
        return (*self.handle.stamp(self._file(index)), self.path, self._scale, index)

    def _load(self, index: tuple[int, ...]) -> np.ndarray | None:
        store, file = self.handle, self._file(index)
        if self._scale.sharding is None:
            data = store.get(file)
            if data is None:
                packed = store.get(file + _COMPRESSED)
                data = None if packed is None else gzip.decompress(packed)
            elif data[:2] == b"\x1f\x8b" and self._scale.encoding == "raw":
                # A server that stores it compressed without saying so in a header; raw voxels have a known size.
                data = data if len(data) == self._bytes_of(index) else gzip.decompress(data)
        else:
            data = self._in_shard(store, file, index)
        if data is None:
            self._check_present(store)
            return None
        try:
            return self._decode(data, index)
        except Exception as error:
            place = ", ".join(
                f"{i * c}:{min((i + 1) * c, n)}"
                for i, c, n in zip(index[1:], self._chunks[1:], self._scale.size[::-1])
            )
            raise file_fault(
                error, store.where(file), f"chunk [{place}] cannot be read", remedy="copy the volume again"
            ) from error

    def _check_present(self, store: ByteStore) -> None:
        if not is_url(self.path) and store.get(INFO) is None:
            raise VolumenError(
                self.path, "the volume has vanished while it was in use", remedy="bring it back"
            )

    def _shape_of(self, index: tuple[int, ...]) -> tuple[int, ...]:
        sizes = zip(index[1:], self._chunks[1:], self._scale.size[::-1], strict=True)
        return (self._info.channels, *(min(c, n - i * c) for i, c, n in sizes))

    def _bytes_of(self, index: tuple[int, ...]) -> int:
        return int(np.prod(self._shape_of(index))) * self.dtype.itemsize

    def _in_shard(self, store: ByteStore, file: str, index: tuple[int, ...]) -> bytes | None:
        sharding = self._scale.sharding
        assert sharding is not None
        number = chunk_number(index[:0:-1], self._scale.grid)
        _, minishard = sharding.place(number)
        table = BLOCKS.get(
            (*store.stamp(file), self.path, self._scale, "minishard", minishard),
            lambda: self._minishard(store, file, minishard),
        )
        found = np.flatnonzero(table[:, 0] == number)
        if not len(found):
            return None
        _, start, stop = (int(value) for value in table[found[0]])
        data = store.get(file, sharding.index_bytes + start, stop - start)
        return None if data is None else unpack(data, sharding.data_packing)

    def _minishard(self, store: ByteStore, file: str, minishard: int) -> np.ndarray:
        """Return (number, start, stop) of each chunk of a minishard."""
        sharding = self._scale.sharding
        assert sharding is not None
        place = store.get(file, 16 * minishard, 16)
        if place is None:
            return np.zeros((0, 3), np.int64)
        start, stop = (int(value) for value in np.frombuffer(place, "<u8"))
        if start == stop:
            return np.zeros((0, 3), np.int64)
        data = store.get(file, sharding.index_bytes + start, stop - start)
        try:
            entries = read_minishard(unpack(data or b"", sharding.index_packing))
        except Exception as error:
            raise file_fault(
                error, store.where(file), "its index is damaged", remedy="copy it again"
            ) from error
        return np.array([(n, *part) for n, part in sorted(entries.items())], np.int64).reshape(-1, 3)

    def _decode(self, data: bytes, index: tuple[int, ...]) -> np.ndarray:
        shape, encoding = self._shape_of(index), self._scale.encoding
        if encoding == "compressed_segmentation":
            return decode_segmentation(data, shape, self._info.dtype, self._scale.block)
        if encoding == "raw":
            return np.frombuffer(data, self._info.dtype).reshape(shape)
        import imagecodecs

        decode = imagecodecs.jpeg_decode if encoding == "jpeg" else imagecodecs.png_decode
        # A picture of the chunk: its rows are (z, y), its columns x, or both in one axis.
        pixels = decode(data)
        return np.moveaxis(pixels.reshape(*shape[1:], shape[0]), -1, 0)

    def fingerprint(self) -> str:
        """Return a hash of the description; on disk also of all files' names, sizes and times."""
        details = (self.dtype.name, self.channels, self._scale)
        if is_url(self.path):
            return digest([self.path, *details])
        from pathlib import Path

        from volumen.data.caching.fingerprints import folder_fingerprint

        return folder_fingerprint(Path(self.path, self._scale.key), *details)


def open_precomputed(path: str, *, level: int = 0, ndim: int | None = None) -> PrecomputedVolume:
    """Open a scale of a precomputed volume.

    Args:
        path: folder or URL.
        level: number of the scale, 0 is the finest.
        ndim: 2 reads a volume of one section as a 2D image; None does so too.

    Raises:
        VolumenError: its description is missing or damaged, or uses an encoding that is not read.
        SingleLevelError: there is no such scale.
    """
    content = read_json(path, INFO)
    if content is None:
        raise VolumenError(path, expected="a file `info`", found="none", remedy="check the path")
    info = parse_info(path, content)
    if level >= len(info.scales):
        raise SingleLevelError(
            path,
            expected=f"a level from 0 to {len(info.scales) - 1}",
            found=level,
            remedy="set dataset_config.ome_zarr_resolution to 0",
        )
    scale = info.scales[level]
    shape = (info.channels, *scale.size[::-1])
    spatial = (2, 3) if shape[1] == 1 and ndim in (None, 2) else (1, 2, 3)
    if ndim is not None and len(spatial) != ndim:
        raise VolumenError(path, expected=f"{ndim} spatial axes", found=f"shape {shape[1:]}")
    return PrecomputedVolume(path, info, scale, info.scales[0], AxisMap(shape, spatial, 0))
