"""Presents layers as neuroglancer precomputed volumes, whose chunks are read when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from volumen.data.formats.precomputed.info import Scale
from volumen.data.space.units import factor
from volumen.viewing.layers import View, ViewLayer

CHUNK, PLANE = 64, 256
_SKIPPED = 2
"""Coarser levels that are made of a volume without levels: each has every second voxel of the previous one."""
_IMAGE_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "float32")


@dataclass(frozen=True)
class ServedScale:
    """A scale of a served layer.

    Args:
        scale: its description.
        level: level of the volume that it is read from.
        step: every how many voxels of this level it has.
    """

    scale: Scale
    level: int
    step: int


class ServedLayer:
    """A layer as a precomputed volume.

    Args:
        layer: the layer.
        view: the view, whose first layer defines the coordinates.
    """

    def __init__(self, layer: ViewLayer, view: View) -> None:
        self._layer, self._view = layer, view

    @property
    def dtype(self) -> np.dtype:
        """The type that is served: one that Neuroglancer knows."""
        stored = self._layer.levels[0].dtype
        if self._layer.is_labels:
            return np.dtype(np.uint64 if stored.itemsize == 8 else np.uint32)
        return stored if stored.name in _IMAGE_TYPES else np.dtype(np.float32)

    @cached_property
    def scales(self) -> list[ServedScale]:
        """The scales, the finest first."""
        levels = self._layer.levels
        finest = np.array(levels[0].shape)
        found = []
        for number, volume in enumerate(levels):
            ratio = tuple(max(1, round(a / b)) for a, b in zip(finest, volume.shape, strict=True))
            found.append(self._scale(volume.shape, ratio, number, 1))
        if len(levels) == 1:
            for skip in range(1, _SKIPPED + 1):
                step = 2**skip
                shape = tuple(-(-int(n) // step) if n >= step else int(n) for n in finest)
                if max(shape) < CHUNK // 2:
                    break
                ratio = tuple(step if n >= step else 1 for n in finest)
                found.append(self._scale(shape, ratio, 0, step))
        return found

    def _scale(self, shape: tuple[int, ...], ratio: tuple[int, ...], level: int, step: int) -> ServedScale:
        flat = len(shape) == 2
        metres = factor(self._view.unit, "nanometer") if self._view.unit is not None else None
        sizes = [size * (metres or 1.0) * r for size, r in zip(self._view.spacing, ratio, strict=True)]
        start = [first // r for first, r in zip(self._layer.start, ratio, strict=True)]
        chunk = (1, PLANE, PLANE) if flat else (CHUNK,) * 3
        full = (1, *shape) if flat else shape
        lead = [sizes[0]] if flat else []
        scale = Scale(
            key=f"{level}_{step}",
            size=tuple(int(n) for n in full[::-1]),
            chunk=tuple(int(min(c, n)) for c, n in zip(chunk, full, strict=True))[::-1],
            resolution=tuple([*lead, *sizes][::-1]),
            offset=tuple([*([0] if flat else []), *start][::-1]),
            encoding="raw",
        )
        return ServedScale(scale, level, step)

    def info(self) -> dict[str, Any]:
        """Return the content of the file `info`."""
        entries = [
            {
                "key": item.scale.key,
                "size": list(item.scale.size),
                "resolution": list(item.scale.resolution),
                "voxel_offset": list(item.scale.offset),
                "chunk_sizes": [list(item.scale.chunk)],
                "encoding": "raw",
            }
            for item in self.scales
        ]
        return {
            "@type": "neuroglancer_multiscale_volume",
            "type": "segmentation" if self._layer.is_labels else "image",
            "data_type": self.dtype.name,
            "num_channels": self._layer.levels[0].channels,
            "scales": entries,
        }

    def chunk(self, key: str, name: str) -> bytes | None:
        """Return the bytes of a chunk; None if there is no such scale or chunk.

        Args:
            key: key of the scale.
            name: name of the chunk, such as "0-64_0-64_0-64" (X, Y, Z).
        """
        served = next((item for item in self.scales if item.scale.key == key), None)
        box = None if served is None else _box(served.scale, name)
        if served is None or box is None:
            return None
        volume = self._layer.levels[served.level]
        box = box[-len(volume.shape) :]
        region = tuple(
            slice(low * self._step(served, axis), min(high * self._step(served, axis), volume.shape[axis]))
            for axis, (low, high) in enumerate(box)
        )
        values = volume.read(region)
        steps = tuple(slice(None, None, self._step(served, axis)) for axis in range(len(box)))
        values = values[(slice(None), *steps)].astype(self.dtype, copy=False)
        return np.ascontiguousarray(values, dtype=self.dtype.newbyteorder("<")).tobytes()

    def _step(self, served: ServedScale, axis: int) -> int:
        return served.step if self._layer.levels[served.level].shape[axis] >= served.step else 1


def _box(scale: Scale, name: str) -> list[tuple[int, int]] | None:
    """Return (start, stop) per axis, (Z, Y, X), of a chunk's name; None if it is none of the scale."""
    try:
        parts = [tuple(int(end) for end in part.split("-")) for part in name.split("_")]
    except ValueError:
        return None
    if len(parts) != 3 or any(len(part) != 2 for part in parts):
        return None
    index = []
    for (low, _), offset, size, chunk in zip(parts, scale.offset, scale.size, scale.chunk, strict=True):
        number, rest = divmod(low - offset, chunk)
        if rest or not 0 <= number * chunk < size:
            return None
        index.append(number)
    if scale.chunk_name(tuple(index)) != name:
        return None
    return [(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, scale.chunk, scale.size, strict=True)][
        ::-1
    ]
