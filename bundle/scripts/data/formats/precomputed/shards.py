"""Chunks packed into shards: where the chunk of a number lies.

Source: https://github.com/google/neuroglancer/blob/master/src/datasource/precomputed/sharded.md
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_MASK = 0xFFFFFFFF
_HASHES = ("identity", "murmurhash3_x86_128")
_PACKINGS = ("raw", "gzip")


@dataclass(frozen=True)
class Sharding:
    """How chunks are packed into files.

    Args:
        preshift: bits of a chunk's number that consecutive chunks of one minishard share.
        hashing: "identity" or "murmurhash3_x86_128".
        minishard_bits: bits of the hashed number that give the minishard in a shard.
        shard_bits: bits above them that give the shard.
        index_packing: "raw" or "gzip", of a minishard's index.
        data_packing: "raw" or "gzip", of a chunk.
    """

    preshift: int
    hashing: str
    minishard_bits: int
    shard_bits: int
    index_packing: str = "raw"
    data_packing: str = "raw"

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> Sharding:
        """Return the sharding that `info` describes.

        Raises:
            ValueError: a hash or a packing that the format does not define.
        """
        result = cls(
            int(entry["preshift_bits"]),
            entry["hash"],
            int(entry["minishard_bits"]),
            int(entry["shard_bits"]),
            entry.get("minishard_index_encoding", "raw"),
            entry.get("data_encoding", "raw"),
        )
        if result.hashing not in _HASHES or not {result.index_packing, result.data_packing} <= set(_PACKINGS):
            raise ValueError(f"sharding {dict(entry)}")
        return result

    def plain(self) -> dict[str, Any]:
        """Return the entry of `info`."""
        return {
            "@type": "neuroglancer_uint64_sharded_v1",
            "preshift_bits": self.preshift,
            "hash": self.hashing,
            "minishard_bits": self.minishard_bits,
            "shard_bits": self.shard_bits,
            "minishard_index_encoding": self.index_packing,
            "data_encoding": self.data_packing,
        }

    @property
    def index_bytes(self) -> int:
        """Size of the index at the start of a shard."""
        return 16 << self.minishard_bits

    def place(self, number: int) -> tuple[int, int]:
        """Return the shard of a chunk's number, and the minishard in it."""
        hashed = number >> self.preshift
        if self.hashing != "identity":
            hashed = murmur_hash(hashed)
        minishard = hashed & ((1 << self.minishard_bits) - 1)
        return (hashed >> self.minishard_bits) & ((1 << self.shard_bits) - 1), minishard

    def file_name(self, shard: int) -> str:
        """Return the file name of a shard."""
        return f"{shard:0{-(-self.shard_bits // 4)}x}.shard"


def unpack(data: bytes, packing: str) -> bytes:
    """Undo the packing of a chunk or of an index."""
    return gzip.decompress(data) if packing == "gzip" else data


def pack(data: bytes, packing: str) -> bytes:
    """Pack a chunk or an index; the same content gives the same bytes."""
    return gzip.compress(data, compresslevel=6, mtime=0) if packing == "gzip" else data


def read_minishard(data: bytes) -> dict[int, tuple[int, int]]:
    """Return the bytes (start, stop) of each chunk's number; they count from the end of the shard's index.

    Args:
        data: an unpacked minishard index: (3, n) uint64 with differences of numbers and starts, and sizes.
    """
    numbers, starts, sizes = np.frombuffer(data, "<u8").reshape(3, -1).astype(np.int64)
    numbers = np.cumsum(numbers)
    # A start counts from the end of the previous chunk.
    stops = np.cumsum(starts + sizes)
    return {
        int(number): (int(stop - size), int(stop))
        for number, stop, size in zip(numbers, stops, sizes, strict=True)
    }


def write_minishard(entries: Sequence[tuple[int, int, int]]) -> bytes:
    """Return the index of chunks (number, start, stop), sorted by number."""
    table = np.zeros((3, len(entries)), "<u8")
    last_number = last_stop = 0
    for i, (number, start, stop) in enumerate(entries):
        table[:, i] = number - last_number, start - last_stop, stop - start
        last_number, last_stop = number, stop
    return table.tobytes()


def chunk_number(index: Sequence[int], grid: Sequence[int]) -> int:
    """Return the compressed Morton code of a chunk; `index` and `grid` are (X, Y, Z)."""
    number = place = 0
    bits = [(n - 1).bit_length() for n in grid]
    for bit in range(max(bits)):
        for axis, count in enumerate(bits):
            if bit < count:
                number |= ((index[axis] >> bit) & 1) << place
                place += 1
    return number


def chunk_index(number: int, grid: Sequence[int]) -> tuple[int, ...]:
    """Return the chunk (X, Y, Z) of a compressed Morton code; it may lie outside the grid."""
    index, place = [0] * len(grid), 0
    bits = [(n - 1).bit_length() for n in grid]
    for bit in range(max(bits)):
        for axis, count in enumerate(bits):
            if bit < count:
                index[axis] |= ((number >> place) & 1) << bit
                place += 1
    return tuple(index)


def number_bits(grid: Sequence[int]) -> int:
    """Return the number of bits of the largest compressed Morton code."""
    return sum((n - 1).bit_length() for n in grid)


def murmur_hash(key: int) -> int:
    """Return the low 64 bits of MurmurHash3_x86_128 with seed 0 of a 64-bit number.

    Source: https://github.com/aappleby/smhasher/blob/master/src/MurmurHash3.cpp, for a key of 8 bytes.
    """
    h1 = h2 = h3 = h4 = 0
    k1, k2 = key & _MASK, (key >> 32) & _MASK
    k2 = _rotate(k2 * 0xAB0E9789 & _MASK, 16) * 0x38B34AE5 & _MASK
    h2 ^= k2
    k1 = _rotate(k1 * 0x239B961B & _MASK, 15) * 0xAB0E9789 & _MASK
    h1 ^= k1
    h1, h2, h3, h4 = (h ^ 8 for h in (h1, h2, h3, h4))
    h1 = (h1 + h2 + h3 + h4) & _MASK
    h2, h3, h4 = (h1 + h2) & _MASK, (h1 + h3) & _MASK, (h1 + h4) & _MASK
    h1, h2, h3, h4 = _mix(h1), _mix(h2), _mix(h3), _mix(h4)
    h1 = (h1 + h2 + h3 + h4) & _MASK
    h2 = (h1 + h2) & _MASK
    return h2 << 32 | h1


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _MASK


def _mix(value: int) -> int:
    value = (value ^ value >> 16) * 0x85EBCA6B & _MASK
    value = (value ^ value >> 13) * 0xC2B2AE35 & _MASK
    return value ^ value >> 16
