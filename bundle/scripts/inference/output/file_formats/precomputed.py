"""Writes neuroglancer precomputed volumes: multiscale, sharded if large, label maps as compressed segmentation."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.formats.precomputed.info import Scale
from volumen.data.formats.precomputed.segmentation_codec import encode_segmentation
from volumen.data.formats.precomputed.shards import (
    Sharding,
    chunk_index,
    number_bits,
    pack,
    write_minishard,
)
from volumen.inference.output.file_formats.slabs import final_path, scale_to, wide
from volumen.inference.output.ome_metadata import image_label
from volumen.inference.output.ome_zarr import ZarrOutput, is_label_map

logger = logging.getLogger(__name__)

CHUNK = 64
PLANE = 256
"""Voxels of a chunk per axis in 3D and in 2D."""
MOST_FILES = 4096
"""A scale of more chunks than this is sharded."""
_MINISHARD, _SHARD = 9, 3
"""Bits of the chunks in a minishard, and of the minishards in a shard: 4096 chunks of 64 x 64 x 64 voxels."""
_RECENT = 16
_INTEGRAL = 0.01
"""Largest distance of a place from a whole number of voxels that is no rounding error."""


def write_precomputed(
    path: Path, arrays: ZarrOutput, target: str, *, compress: bool, classes: Sequence[str] | None = None
) -> None:
    """Write a target as a precomputed volume with all levels of its pyramid.

    The format counts nanometers, and the place of a volume in whole voxels. A place between two voxels is rounded with
    a warning; coarse levels of a volume that starts at an odd voxel are rounded down.

    Args:
        path: the folder to create.
        arrays: the finished prediction.
        target: the target to write.
        compress: whether chunks of images in shards are compressed.
        classes: names of the classes from 0 on, of a label map.
    """
    stored = arrays.stored[target]
    labels = is_label_map(stored)
    dtype = np.dtype(np.uint32) if labels else wide(stored.dtype)
    _warn(final_path(path), arrays)
    scales = [_scale(arrays, level, labels, compress) for level in range(len(arrays.factors) + 1)]
    path.mkdir(parents=True)
    info: dict[str, Any] = {
        "@type": "neuroglancer_multiscale_volume",
        "type": "segmentation" if labels else "image",
        "data_type": dtype.name,
        "num_channels": stored.channels,
        "scales": [_plain(scale) for scale in scales],
    }
    if labels and stored.head.kind != "instances":
        info["segment_properties"] = "properties"
        (path / "properties").mkdir()
        properties = _properties(image_label(stored, classes)["properties"])
        (path / "properties" / "info").write_text(json.dumps(properties, indent=1))
    (path / "info").write_text(json.dumps(info, indent=1))
    for level, scale in enumerate(scales):
        (path / scale.key).mkdir()
        _write_scale(path / scale.key, scale, _Chunks(arrays, target, level, scale, dtype))


def _scale(arrays: ZarrOutput, level: int, labels: bool, compress: bool) -> Scale:
    shape = _to_3d(arrays.level_shape(level), 1)
    factors = _to_3d(arrays.level_scale(level), 1)
    by = scale_to(arrays, "nanometer")
    size = [step * (by or 1.0) for step in _to_3d(arrays.spacing, 1.0)]
    start = _to_3d([round(value) for value in _place(arrays)], 0)
    grid_chunk = (1, PLANE, PLANE) if len(arrays.shape) == 2 else (CHUNK,) * 3
    resolution = tuple(float(f"{s * f:.12g}") for s, f in zip(size, factors, strict=True))
    scale = Scale(
        key="_".join(f"{value:g}" for value in resolution[::-1]),
        size=shape[::-1],
        chunk=tuple(min(c, n) for c, n in zip(grid_chunk, shape, strict=True))[::-1],
        resolution=resolution[::-1],
        offset=tuple(o // f for o, f in zip(start, factors, strict=True))[::-1],
        encoding="compressed_segmentation" if labels else "raw",
    )
    bits = number_bits(scale.grid)
    if np.prod(scale.grid) <= MOST_FILES:
        return scale
    preshift = min(_MINISHARD, bits)
    minishards = min(_SHARD, bits - preshift)
    sharding = Sharding(
        preshift, "identity", minishards, bits - preshift - minishards, "gzip", "gzip" if compress else "raw"
    )
    return Scale(**{**scale.__dict__, "sharding": sharding})


def _place(arrays: ZarrOutput) -> list[float]:
    """Return the number of the first voxel per axis, counted from the origin of the space."""
    return [
        start + place / size
        for start, place, size in zip(arrays.origin, arrays.place, arrays.spacing, strict=True)
    ]


def _warn(path: Path, arrays: ZarrOutput) -> None:
    """Warn of a voxel size without a unit, and of a place that is rounded."""
    if scale_to(arrays, "nanometer") is None:
        logger.warning(
            "%s: the image states no unit of length; the format counts its voxel size in nanometers", path
        )
    off = max(abs(value - round(value)) for value in _place(arrays))
    if off > _INTEGRAL:
        logger.warning(
            "%s: the place of its first voxel is rounded by up to %.2g voxels, since the format counts whole voxels",
            path,
            off,
        )


def _to_3d(values: Sequence, lead: Any) -> tuple:
    return (*[lead] * (3 - len(values)), *values)


def _plain(scale: Scale) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "key": scale.key,
        "size": list(scale.size),
        "resolution": list(scale.resolution),
        "voxel_offset": list(scale.offset),
        "chunk_sizes": [list(scale.chunk)],
        "encoding": scale.encoding,
    }
    if scale.encoding == "compressed_segmentation":
        entry["compressed_segmentation_block_size"] = list(scale.block)
    if scale.sharding is not None:
        entry["sharding"] = scale.sharding.plain()
    return entry


def _properties(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the names of the classes as neuroglancer's segment properties."""
    return {
        "@type": "neuroglancer_segment_properties",
        "inline": {
            "ids": [str(entry["label-value"]) for entry in entries],
            "properties": [
                {"id": "label", "type": "label", "values": [str(entry["class"]) for entry in entries]}
            ],
        },
    }


class _Chunks:
    """The encoded chunks of one level, read through the most recent blocks of the arrays."""

    def __init__(self, arrays: ZarrOutput, target: str, level: int, scale: Scale, dtype: np.dtype) -> None:
        self._arrays, self._target, self._level = arrays, target, level
        self._scale, self._dtype = scale, dtype
        self._shape = arrays.level_shape(level)
        self._recent: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()

    def encoded(self, index: Sequence[int]) -> bytes:
        """Return the encoded chunk (X, Y, Z)."""
        box = [
            slice(i * c, min((i + 1) * c, n))
            for i, c, n in zip(index, self._scale.chunk, self._scale.size, strict=True)
        ][::-1]
        values = self._read(tuple(box[-len(self._shape) :]))
        if values.ndim == 3:
            values = values[:, None]
        values = np.ascontiguousarray(values, dtype=self._dtype.newbyteorder("<"))
        if self._scale.encoding == "raw":
            return values.tobytes()
        return encode_segmentation(values, self._scale.block)

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        sizes = self._arrays.block_shape
        grid = [range(p.start // s, -(-p.stop // s)) for p, s in zip(box, sizes, strict=True)]
        channels = self._arrays.stored[self._target].channels
        out = np.empty((channels, *(p.stop - p.start for p in box)), self._arrays.stored[self._target].dtype)
        for corner in np.ndindex(*(len(part) for part in grid)):
            index = tuple(part[c] for part, c in zip(grid, corner, strict=True))
            whole = tuple(
                slice(i * s, min((i + 1) * s, n)) for i, s, n in zip(index, sizes, self._shape, strict=True)
            )
            shared = [
                slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, whole, strict=True)
            ]
            inside = [slice(p.start - w.start, p.stop - w.start) for p, w in zip(shared, whole, strict=True)]
            outside = [slice(p.start - b.start, p.stop - b.start) for p, b in zip(shared, box, strict=True)]
            out[(slice(None), *outside)] = self._block(index, whole)[(slice(None), *inside)]
        return out

    def _block(self, index: tuple[int, ...], whole: tuple[slice, ...]) -> np.ndarray:
        block = self._recent.pop(index, None)
        if block is None:
            block = self._arrays.read(self._target, whole, self._level)
        self._recent[index] = block
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return block


def _write_scale(folder: Path, scale: Scale, chunks: _Chunks) -> None:
    if scale.sharding is None:
        for index in np.ndindex(*scale.grid[::-1]):
            (folder / scale.chunk_name(index[::-1])).write_bytes(chunks.encoded(index[::-1]))
        return
    per_shard = scale.sharding.preshift + scale.sharding.minishard_bits
    for shard in range(1 << scale.sharding.shard_bits):
        _write_shard(folder / scale.sharding.file_name(shard), scale, shard << per_shard, chunks)


def _write_shard(path: Path, scale: Scale, first: int, chunks: _Chunks) -> None:
    """Write a shard in one pass: a place for its index, the chunks, the indices of the minishards, then its index.

    Args:
        path: the file; none is written if no chunk of the shard lies in the grid.
        scale: the scale.
        first: number of the first chunk of the shard.
        chunks: the chunks.
    """
    sharding = scale.sharding
    assert sharding is not None
    minishards: list[list[tuple[int, int, int]]] = []
    position = 0
    with path.open("wb") as stream:
        stream.write(bytes(sharding.index_bytes))
        for minishard in range(1 << sharding.minishard_bits):
            start = first + (minishard << sharding.preshift)
            entries: list[tuple[int, int, int]] = []
            for number in range(start, start + (1 << sharding.preshift)):
                index = chunk_index(number, scale.grid)
                if all(i < n for i, n in zip(index, scale.grid, strict=True)):
                    position += stream.write(pack(chunks.encoded(index), sharding.data_packing))
                    size = stream.tell() - sharding.index_bytes
                    entries.append((number, entries[-1][2] if entries else _end(minishards), size))
            minishards.append(entries)
        table = np.zeros((1 << sharding.minishard_bits, 2), "<u8")
        for minishard, entries in enumerate(minishards):
            if entries:
                table[minishard, 0] = position
                position += stream.write(pack(write_minishard(entries), sharding.index_packing))
                table[minishard, 1] = position
        stream.seek(0)
        stream.write(table.tobytes())
    if not position:
        path.unlink()


def _end(minishards: Sequence[Sequence[tuple[int, int, int]]]) -> int:
    """Return the byte after the last chunk of the minishards that are written already."""
    return next((entries[-1][2] for entries in reversed(minishards) if entries), 0)
