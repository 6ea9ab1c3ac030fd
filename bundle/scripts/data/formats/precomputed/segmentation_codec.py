"""Encodes and decodes `compressed_segmentation`: a table of values and a few bits per voxel for each block.

Source: https://github.com/google/neuroglancer/blob/master/src/sliceview/compressed_segmentation/README.md
"""

from __future__ import annotations

import numba
import numpy as np

_BITS = np.array([0, 1, 2, 4, 8, 16, 32])


def decode_segmentation(
    data: bytes, shape: tuple[int, ...], dtype: np.dtype, block: tuple[int, ...]
) -> np.ndarray:
    """Decode a chunk.

    Args:
        data: the encoded chunk.
        shape: (C, Z, Y, X).
        dtype: uint32 or uint64.
        block: block size (X, Y, Z).

    Raises:
        ValueError: the data are truncated or damaged.
    """
    words = np.frombuffer(data[: len(data) // 4 * 4], "<u4").astype(np.uint32)
    out = np.zeros(shape, dtype.newbyteorder("="))
    if len(words) < len(out):
        raise ValueError("ends before its header does")
    for channel in range(len(out)):
        part = words[words[channel] :]
        bx, by, bz = block
        if not _decode(part, out[channel], bx, by, bz, dtype.itemsize // 4):
            raise ValueError("refers to bytes beyond its end")
    return out


def encode_segmentation(values: np.ndarray, block: tuple[int, ...] = (8, 8, 8)) -> bytes:
    """Encode a chunk.

    Args:
        values: uint32 or uint64, (C, Z, Y, X).
        block: block size (X, Y, Z).
    """
    bx, by, bz = block
    starts, parts, start = [], [], len(values)
    for channel in values:
        words = _encode(np.ascontiguousarray(channel), bx, by, bz, values.dtype.itemsize // 4)
        starts.append(start)
        parts.append(words)
        start += len(words)
    return np.concatenate([np.array(starts, np.uint32), *parts]).astype("<u4").tobytes()


@numba.njit(cache=True)
def _decode(words, out, bx, by, bz, width):
    depth, height, length = out.shape
    nx, ny, nz = -(-length // bx), -(-height // by), -(-depth // bz)
    if len(words) < 2 * nx * ny * nz:
        return False
    for iz in range(nz):
        for iy in range(ny):
            for ix in range(nx):
                at = 2 * (ix + nx * (iy + ny * iz))
                table, bits = np.int64(words[at] & 0xFFFFFF), np.int64(words[at] >> 24)
                first = np.int64(words[at + 1])
                mask = (np.int64(1) << bits) - 1
                for z in range(iz * bz, min((iz + 1) * bz, depth)):
                    for y in range(iy * by, min((iy + 1) * by, height)):
                        for x in range(ix * bx, min((ix + 1) * bx, length)):
                            entry = np.int64(0)
                            if bits:
                                place = bits * ((x - ix * bx) + bx * ((y - iy * by) + by * (z - iz * bz)))
                                word = first + (place >> 5)
                                if word >= len(words):
                                    return False
                                entry = (np.int64(words[word]) >> (place & 31)) & mask
                            where = table + entry * width
                            if where + width > len(words):
                                return False
                            value = np.uint64(words[where])
                            if width == 2:
                                value |= np.uint64(words[where + 1]) << np.uint64(32)
                            out[z, y, x] = value
    return True


@numba.njit(cache=True)
def _encode(values, bx, by, bz, width):
    depth, height, length = values.shape
    nx, ny, nz = -(-length // bx), -(-height // by), -(-depth // bz)
    count = bx * by * bz
    # A block has at most one table entry and 32 bits per voxel.
    words = np.zeros(nx * ny * nz * (2 + count * (width + 1)), np.uint32)
    end = 2 * nx * ny * nz
    for iz in range(nz):
        for iy in range(ny):
            for ix in range(nx):
                part = values[
                    iz * bz : min((iz + 1) * bz, depth),
                    iy * by : min((iy + 1) * by, height),
                    ix * bx : min((ix + 1) * bx, length),
                ]
                found = np.unique(part.copy().reshape(-1))
                bits = 0
                for bits in _BITS:
                    if len(found) <= np.int64(1) << bits:
                        break
                at = 2 * (ix + nx * (iy + ny * iz))
                first = end
                end += (count * bits + 31) // 32
                words[at], words[at + 1] = np.uint32(end) | np.uint32(bits) << np.uint32(24), first
                for entry in range(len(found)):
                    words[end] = np.uint32(np.uint64(found[entry]) & np.uint64(0xFFFFFFFF))
                    if width == 2:
                        words[end + 1] = np.uint32(np.uint64(found[entry]) >> np.uint64(32))
                    end += width
                if bits == 0:
                    continue
                for z in range(part.shape[0]):
                    for y in range(part.shape[1]):
                        for x in range(part.shape[2]):
                            entry = np.searchsorted(found, part[z, y, x])
                            place = bits * (x + bx * (y + by * z))
                            words[first + (place >> 5)] |= np.uint32(entry) << np.uint32(place & 31)
    return words[:end]
