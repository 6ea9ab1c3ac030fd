"""Chunks of a zarr array on disk, read and decoded without zarr's event loop.

zarr-python schedules every chunk on an event loop, which costs more than decoding 64 x 64 x 64 bytes. Patches
are read by workers that run beside each other already, so here a chunk is one `open`, one `read` and one call
of its codec: with chunks of 64 x 64 x 64, 1.7 to 10 times as fast as zarr's slicing (benchmarks/volume_reading.py).
A process that has read may fork. What this module does not know (other stores, grids or codecs) is left to zarr.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import digest
from volumen.utils.errors import VolumenError, file_fault
from volumen.utils.files.positioned_io import BINARY, read_at

BytesDecoder = Callable[[Any], Any]
_Codec = dict[str, Any]
"""A codec as the zarr v3 specification writes it: its name and its configuration."""
_Stamp = tuple[str, int, int, str]

_REMEDY = "copy the volume again, or delete that file so that its voxels read as the fill value"
_PERMISSION = "give yourself read permission (chmod u+r)"
_COMPRESSORS = ("blosc", "gzip", "zstd")
"""Codecs of zarr v3 that numcodecs decodes, under the same name."""
_READ_ONLY = os.O_RDONLY | BINARY
_ABSENT = 2**64 - 1
"""Offset and size that a shard's index gives for a chunk that is not stored."""


@dataclass(frozen=True)
class _Shards:
    """How chunks lie in a shard: the zarr v3 `sharding_indexed` codec with a plain or checksummed index."""

    grid: tuple[int, ...]
    at_end: bool
    checksum: bool

    @property
    def index_bytes(self) -> int:
        return prod(self.grid) * 16 + 4 * self.checksum


@dataclass(frozen=True)
class _Decoder:
    """Turns a stored chunk into an array.

    Attributes:
        steps: the decoders of bytes, in the order in which they work.
        dtype: type of the values as they are stored.
        shape: shape of a chunk in the order in which it is stored.
        axes: stored axis of each axis of the array.
    """

    steps: tuple[BytesDecoder, ...]
    dtype: np.dtype
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def decode(self, data: Any) -> np.ndarray:
        for step in self.steps:
            data = step(data)
        return np.frombuffer(data, self.dtype).reshape(self.shape).transpose(self.axes)


class ChunkReader:
    """Reads regions of one array; safe to use from many threads.

    Args:
        folder: folder of the array.
        metadata: zarr's metadata of the array.
        decoder: turns a stored chunk into an array of the chunk's shape.
        chunks: shape of a chunk.
        shards: how chunks are packed into files, None where each is a file.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Any,
        decoder: _Decoder,
        chunks: tuple[int, ...],
        shards: _Shards | None,
    ) -> None:
        self.folder = str(folder)
        self._witness = metadata_file(folder)
        self.shape = tuple(metadata.shape)
        self.dtype = _native(metadata).newbyteorder("=")
        self.chunks = chunks
        self._key = metadata.encode_chunk_key
        self._fill = 0 if metadata.fill_value is None else metadata.fill_value
        self._decoder = decoder
        self._shards = shards
        self._form = digest([metadata.to_dict()])

    def read(self, region: tuple[slice, ...]) -> np.ndarray:
        """Return a region of the stored array; chunks that are not stored read as the fill value.

        Raises:
            VolumenError: a chunk cannot be read or decoded; names its file and its place. Or the whole array has
                vanished, as with a disk that is no longer mounted: it is not taken for one without chunks.
        """
        out = np.empty([part.stop - part.start for part in region], self.dtype)
        for parts in product(*(_along(part, chunk) for part, chunk in zip(region, self.chunks))):
            index, source, target = zip(*parts)
            block = self._chunk(index)
            out[target] = self._fill if block is None else block[source]
        return out

    def _chunk(self, index: tuple[int, ...]) -> np.ndarray | None:
        """Return a decoded chunk; None if it is not stored."""
        if self._shards is None:
            file, inner = f"{self.folder}/{self._key(index)}", 0
        else:
            grid = self._shards.grid
            file = f"{self.folder}/{self._key(tuple(i // g for i, g in zip(index, grid)))}"
            inner = int(np.ravel_multi_index([i % g for i, g in zip(index, grid)], grid))
        try:
            status = os.stat(file)  # noqa: PTH116  (pathlib takes twice as long, once per chunk)
            # Time and size tell apart what the file held before and after somebody wrote it anew.
            stamp = (file, status.st_mtime_ns, status.st_size, self._form)
            block = BLOCKS.find((stamp, inner))
            return self._load(stamp, inner) if block is None else block
        except _NotStoredError:
            return None
        except FileNotFoundError:
            check_present(self.folder, self._witness)
            return None
        except VolumenError:
            raise
        except Exception as error:
            place = ", ".join(
                f"{i * c}:{min((i + 1) * c, size)}" for i, c, size in zip(index, self.chunks, self.shape)
            )
            raise file_fault(
                error, file, f"chunk [{place}] cannot be read", remedy=remedy_for(error)
            ) from error

    def stored_in_shard(self, shard: tuple[int, ...]) -> np.ndarray:
        """Tell which chunks of a shard are stored, flat in C order; all, where its index cannot be read.

        (What is wrong with it, reading the chunks will tell.)
        """
        assert self._shards is not None
        count = prod(self._shards.grid)
        try:
            descriptor = os.open(f"{self.folder}/{self._key(shard)}", _READ_ONLY)
        except FileNotFoundError:
            return np.zeros(count, bool)
        except OSError:
            return np.ones(count, bool)
        try:
            index = self._load_index(descriptor, os.fstat(descriptor).st_size)
            return _is_stored(index)
        except (OSError, ValueError):
            return np.ones(count, bool)
        finally:
            os.close(descriptor)

    def _load(self, stamp: _Stamp, inner: int) -> np.ndarray:
        file, _, length, _ = stamp
        start = 0
        # A file object would ask the system four more questions about every chunk.
        descriptor = os.open(file, _READ_ONLY)
        try:
            if self._shards is not None:
                start, length = self._place_in_shard(descriptor, stamp, inner)
            data = _read_at(descriptor, length, start)
        finally:
            os.close(descriptor)
        block = self._decoder.decode(data)
        BLOCKS.keep((stamp, inner), block)
        return block

    def _place_in_shard(self, descriptor: int, stamp: _Stamp, inner: int) -> tuple[int, int]:
        index = BLOCKS.get((stamp, "index"), partial(self._load_index, descriptor, stamp[2]))
        start, length = (int(value) for value in index[inner])
        if start == _ABSENT and length == _ABSENT:
            raise _NotStoredError
        return start, length

    def _load_index(self, descriptor: int, size: int) -> np.ndarray:
        assert self._shards is not None
        wanted = self._shards.index_bytes
        data = _read_at(descriptor, wanted, max(size - wanted, 0) if self._shards.at_end else 0)
        return _parse_index(data, self._shards)


def remedy_for(error: Exception) -> str:
    """Return what to do about a chunk that cannot be read: only one that cannot be decoded is to be deleted."""
    if isinstance(error, PermissionError):
        return _PERMISSION
    if isinstance(error, OSError) and error.errno is not None:  # gzip's errors about content have no number
        return "check the disk, and try again"
    if isinstance(error, MemoryError):
        return "free memory, or use fewer workers"
    return _REMEDY


def _parse_index(data: bytes, shards: _Shards) -> np.ndarray:
    body = _verify_checksum(data) if shards.checksum else data
    return np.frombuffer(body, "<u8").reshape(-1, 2)


def _is_stored(index: np.ndarray) -> np.ndarray:
    return ~(index == _ABSENT).all(axis=1)


def shard_form(metadata: Any) -> _Shards | None:
    """Return how chunks lie in the shards of a zarr v3 array; None where it has none, or of a form not known here."""
    outer = tuple(metadata.chunk_grid.chunk_shape)
    return _unpack_shards(metadata.codecs, outer)[2]


def stored_by_index(data: bytes, form: _Shards) -> np.ndarray:
    """Tell which chunks of a shard are stored, flat in C order, from the bytes of its index; all, if it is damaged."""
    try:
        return _is_stored(_parse_index(data, form))
    except ValueError:
        return np.ones(prod(form.grid), bool)


def metadata_file(folder: Path) -> str:
    """Return the file that is there as long as the array is, while a chunk may be absent."""
    found = [folder / name for name in (".zarray", "zarr.json") if (folder / name).is_file()]
    return str(found[0] if found else folder)


def check_present(path: str, witness: str) -> None:
    """Refuse an array that has vanished, as with a disk that is no longer mounted: it would read as the fill value.

    Args:
        path: the array.
        witness: its `metadata_file` from when it was opened.

    Raises:
        VolumenError: there is no such file now.
    """
    if not os.path.exists(witness):  # noqa: PTH110
        raise VolumenError(
            path,
            "the volume has vanished while it was in use",
            remedy="bring it back; a training goes on with --resume",
        )


def _along(part: slice, chunk: int) -> list[tuple[int, slice, slice]]:
    """Give the chunks that a part of an axis touches: the number of each, what of it, and where in the part."""
    found = []
    for number in range(part.start // chunk, -(-part.stop // chunk)):
        first = number * chunk
        low, high = max(part.start, first), min(part.stop, first + chunk)
        found.append((number, slice(low - first, high - first), slice(low - part.start, high - part.start)))
    return found


class _NotStoredError(Exception):
    """A chunk is absent from its shard."""


def chunk_reader(array: Any) -> ChunkReader | None:
    """Return a reader for a zarr array, or None where only zarr itself can read it."""
    from zarr.storage import LocalStore

    if not isinstance(array.store, LocalStore) or prod(array.shape) == 0:
        return None
    metadata, folder = array.metadata, Path(array.store.root, array.path)
    dtype = _native(metadata)
    if metadata.zarr_format == 2:
        chunks = tuple(metadata.chunks)
        return ChunkReader(folder, metadata, _decoder_v2(metadata, dtype), chunks, None)
    grid = metadata.chunk_grid.to_dict()
    if grid["name"] != "regular":
        return None
    outer = tuple(grid["configuration"]["chunk_shape"])
    codecs, chunks, shards = _unpack_shards(metadata.codecs, outer)
    decoder = None if codecs is None else _decoder_v3(codecs, chunks, dtype)
    return None if decoder is None else ChunkReader(folder, metadata, decoder, chunks, shards)


def _native(metadata: Any) -> np.dtype:
    dtype = metadata.dtype
    return np.dtype(dtype.to_native_dtype() if hasattr(dtype, "to_native_dtype") else dtype)


def _decoder_v2(metadata: Any, dtype: np.dtype) -> _Decoder:
    codecs = [*(metadata.filters or ()), *([metadata.compressor] if metadata.compressor else [])][::-1]
    shape, axes = tuple(metadata.chunks), tuple(range(len(metadata.chunks)))
    if metadata.order == "F":
        shape, axes = shape[::-1], axes[::-1]
    return _Decoder(tuple(codec.decode for codec in codecs), dtype, shape, axes)


def _unpack_shards(
    codecs: Sequence[Any], outer: tuple[int, ...]
) -> tuple[list[_Codec] | None, tuple[int, ...], _Shards | None]:
    """Look into a sharding codec: the codecs and shape of the chunks inside, and how they are packed."""
    described: list[_Codec] = [codec.to_dict() for codec in codecs]
    if [codec["name"] for codec in described] != ["sharding_indexed"]:
        return described, outer, None
    sharding = described[0]["configuration"]
    index = list(sharding["index_codecs"])
    names = [codec["name"] for codec in index]
    if names not in (["bytes"], ["bytes", "crc32c"]) or _endian(index[0]) != "little":
        return None, outer, None
    chunks = tuple(sharding["chunk_shape"])
    grid = tuple(o // c for o, c in zip(outer, chunks))
    at_end = sharding["index_location"] == "end"
    return list(sharding["codecs"]), chunks, _Shards(grid, at_end, len(names) == 2)


def _decoder_v3(codecs: Sequence[_Codec], chunks: tuple[int, ...], dtype: np.dtype) -> _Decoder | None:
    shape, axes = chunks, tuple(range(len(chunks)))
    steps: list[BytesDecoder] = []
    for codec in codecs:
        name = codec["name"]
        if name == "transpose" and not steps:
            order = list(codec["configuration"]["order"])
            shape = tuple(shape[axis] for axis in order)
            axes = tuple(order.index(axis) for axis in axes)
        elif name == "bytes":
            dtype = dtype.newbyteorder(">" if _endian(codec) == "big" else "<")
        elif name == "crc32c":
            steps.insert(0, _verify_checksum)
        elif name in _COMPRESSORS:
            steps.insert(0, _numcodec(name))
        else:
            return None
    return _Decoder(tuple(steps), dtype, shape, axes)


def _endian(codec: _Codec) -> str:
    return codec.get("configuration", {}).get("endian", "little")


def _numcodec(name: str) -> BytesDecoder:
    import numcodecs

    return numcodecs.get_codec({"id": name}).decode


def _verify_checksum(data: bytes) -> bytes:
    import google_crc32c

    body, stored = data[:-4], int.from_bytes(data[-4:], "little")
    if google_crc32c.value(bytes(body)) != stored:
        raise ValueError("its checksum does not fit its content")
    return body


def _read_at(descriptor: int, length: int, start: int) -> bytes:
    """Read all of a part of a file; the system gives at most 2 GiB at once."""
    data = read_at(descriptor, length, start)
    while len(data) < length:
        more = read_at(descriptor, length - len(data), start + len(data))
        if not more:
            raise ValueError(f"ends after {len(data)} of {length} bytes")
        data += more
    return data
