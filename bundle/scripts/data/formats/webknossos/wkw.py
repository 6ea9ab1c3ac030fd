"""Reads the WKW format: cubes of blocks in Morton order, raw or compressed by LZ4.

Source: https://github.com/scalableminds/webknossos-wrap
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from typing import Any

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.formats.byte_store import ByteStore
from volumen.data.formats.chunk_grid import read_chunks
from volumen.data.formats.precomputed.shards import chunk_number
from volumen.data.formats.volumes import Region
from volumen.utils.errors import VolumenError, file_fault

_HEADER = "header.wkw"
_HEADER_BYTES = 16
_TYPES = {1: "u1", 2: "u2", 3: "u4", 4: "u8", 5: "f4", 6: "f8", 7: "i1", 8: "i2", 9: "i4", 10: "i8"}
_RAW, _LZ4, _LZ4HC = 1, 2, 3


class WkwReader:
    """The voxels of one magnification, in absolute coordinates; what is not stored reads as 0.

    Args:
        path: its folder or URL.

    Attributes:
        dtype: type of the voxels.
        channels: number of channels.
        block: voxels of a block along every axis.

    Raises:
        VolumenError: its header is missing or damaged.
    """

    def __init__(self, path: str) -> None:
        self._store = ByteStore(path)
        self._path = path
        data = self._store.get(_HEADER)
        if data is None:
            raise VolumenError(self._store.where(_HEADER), "is missing", remedy="copy the dataset again")
        sides, self._kind, voxel, size = self._header(data, _HEADER)
        self.block, self._per_file = 1 << (sides & 15), 1 << (sides >> 4)
        self.dtype = np.dtype(_TYPES[voxel]).newbyteorder("<")
        self.channels = size // self.dtype.itemsize

    def _header(self, data: bytes, name: str) -> tuple[int, int, int, int]:
        if len(data) >= _HEADER_BYTES and data[:3] == b"WKW":
            version, sides, kind, voxel, size = struct.unpack_from("<5B", data, 3)
            if version == 1 and kind in (_RAW, _LZ4, _LZ4HC) and voxel in _TYPES and size:
                return sides, kind, voxel, size
        raise VolumenError(self._store.where(name), "its WKW header is damaged", remedy="copy it again")

    def read(self, region: Region) -> np.ndarray:
        """Return (channels, Z, Y, X) of a region (Z, Y, X)."""
        whole = (slice(0, self.channels), *region)
        chunks = (self.channels, *[self.block] * 3)
        return read_chunks(whole, chunks, self.dtype.newbyteorder("="), self._load, self._key)

    def _file(self, index: tuple[int, ...]) -> str:
        z, y, x = (i // self._per_file for i in index[1:])
        return f"z{z}/y{y}/x{x}.wkw"

    def _key(self, index: tuple[int, ...]) -> Hashable:
        return (*self._store.stamp(self._file(index)), index)

    def _load(self, index: tuple[int, ...]) -> np.ndarray | None:
        name = self._file(index)
        xyz = [i % self._per_file for i in index[:0:-1]]
        number = chunk_number(xyz, [self._per_file] * 3)
        size = self.block**3 * self.channels * self.dtype.itemsize
        start, length, found = self._place(name, number, size)
        if not found:
            return None
        data = self._store.get(name, start, length) or b""
        try:
            if self._kind != _RAW:
                import imagecodecs

                data = bytes(imagecodecs.lz4_decode(data, out=size))
            values = np.frombuffer(data, self.dtype, size // self.dtype.itemsize)
        except Exception as error:
            raise file_fault(
                error, self._store.where(name), f"block {number} cannot be read", remedy="copy it again"
            ) from error
        # Channels are fastest, then x, y, z.
        return np.moveaxis(values.reshape(*[self.block] * 3, self.channels), -1, 0)

    def _place(self, name: str, number: int, size: int) -> tuple[int, int, bool]:
        """Return the first byte and the number of bytes of a block, and whether its file exists."""
        count = self._per_file**3

        def ends() -> np.ndarray:
            """Return the end of the header, then the end of each block; nothing if there is no file."""
            head = self._store.get(name, 0, _HEADER_BYTES) if self._exists(name) else None
            if head is None:
                return np.zeros(0, np.int64)
            self._header(head, name)
            first = struct.unpack_from("<Q", head, 8)[0]
            if self._kind == _RAW:
                return np.array([first], np.int64)
            table = self._store.get(name, _HEADER_BYTES, 8 * count) or b""
            return np.concatenate([[first], np.frombuffer(table, "<u8").astype(np.int64)])

        table = BLOCKS.get((*self._store.stamp(name), "wkw", self._path), ends)
        if not len(table):
            return 0, 0, False
        if self._kind == _RAW:
            return int(table[0]) + number * size, size, True
        return int(table[number]), int(table[number + 1] - table[number]), True

    def _exists(self, name: str) -> bool:
        stamp: tuple[Any, ...] = self._store.stamp(name)
        return stamp[-1] is not None
