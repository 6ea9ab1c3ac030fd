"""The description of a precomputed volume: the file `info`.

Source: https://github.com/google/neuroglancer/blob/master/src/datasource/precomputed/volume.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.data.formats.precomputed.shards import Sharding
from volumen.utils.errors import VolumenError

INFO = "info"
ENCODINGS = ("raw", "jpeg", "png", "compressed_segmentation")
"""Encodings of chunks that are read."""


@dataclass(frozen=True)
class Scale:
    """One resolution of a precomputed volume. Sequences have the order (X, Y, Z), as in the file.

    Args:
        key: folder of its chunks, relative to the volume.
        size: voxels per axis.
        chunk: voxels of a chunk per axis.
        resolution: size of a voxel per axis in nanometers.
        offset: number of the first voxel per axis.
        encoding: how a chunk is encoded.
        block: block size of `compressed_segmentation`.
        sharding: how chunks are packed into files; None where each is a file.
    """

    key: str
    size: tuple[int, ...]
    chunk: tuple[int, ...]
    resolution: tuple[float, ...]
    offset: tuple[int, ...]
    encoding: str
    block: tuple[int, ...] = (8, 8, 8)
    sharding: Sharding | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks per axis."""
        return tuple(-(-n // c) for n, c in zip(self.size, self.chunk, strict=True))

    def chunk_name(self, index: tuple[int, ...]) -> str:
        """Return the file name of a chunk, of a scale without shards; `index` is (X, Y, Z)."""
        parts = []
        for i, c, n, o in zip(index, self.chunk, self.size, self.offset, strict=True):
            parts.append(f"{i * c + o}-{min((i + 1) * c, n) + o}")
        return "_".join(parts)


@dataclass(frozen=True)
class Info:
    """The description of a precomputed volume.

    Args:
        dtype: type of the voxels, little-endian.
        channels: number of channels.
        is_segmentation: whether the voxels are numbers of objects.
        scales: the resolutions, the finest first.
    """

    dtype: np.dtype
    channels: int
    is_segmentation: bool
    scales: tuple[Scale, ...]


def parse_info(where: object, content: Mapping[str, Any]) -> Info:
    """Return the description of a volume.

    Args:
        where: the volume, named in errors.
        content: the content of the file `info`.

    Raises:
        VolumenError: something is missing, or an encoding is not read.
    """
    if not content.get("scales"):
        kind = content.get("@type", "something else")
        raise VolumenError(where, expected="a precomputed volume", found=f"{kind}: its `info` has no scales")
    try:
        scales = tuple(_scale(where, entry) for entry in content["scales"])
        dtype = np.dtype(content["data_type"]).newbyteorder("<")
        channels, kind = int(content["num_channels"]), content.get("type", "image")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise VolumenError(
            where, "its `info` is damaged", found=f"{type(error).__name__}: {error}", remedy="copy it again"
        ) from None
    order = sorted(scales, key=lambda scale: scale.resolution)
    return Info(dtype, channels, kind == "segmentation", tuple(order))


def _scale(where: object, entry: Mapping[str, Any]) -> Scale:
    encoding = entry["encoding"]
    if encoding not in ENCODINGS:
        raise VolumenError(
            where,
            expected=f"chunks encoded as {', '.join(ENCODINGS)}",
            found=encoding,
            remedy="convert it, for instance with igneous",
        )
    sharding = entry.get("sharding")
    chunk, size = entry["chunk_sizes"][0], entry["size"]
    if not len(chunk) == len(size) == len(entry["resolution"]) == 3 or min(*chunk, *size) < 1:
        raise ValueError(f"size {size} in chunks of {chunk}")
    return Scale(
        entry["key"],
        tuple(map(int, size)),
        tuple(map(int, chunk)),
        tuple(map(float, entry["resolution"])),
        tuple(map(int, entry.get("voxel_offset", (0, 0, 0)))),
        encoding,
        tuple(entry.get("compressed_segmentation_block_size", (8, 8, 8))),
        None if sharding is None else Sharding.of_json(sharding),
    )
