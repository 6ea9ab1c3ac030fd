"""OME-Zarr 0.5 output: one multiscale image per target in a group, written block by block."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from scripts.inference.results import Stored

OME_VERSION = "0.5"
Coarsen = Callable[[int], None]
"""Makes a whole level of the pyramid from the level before it."""
FEW_BOXES = 32
"""Chunks of a level up to which it is not worth while to share them."""
_UNITS = {
    "nm": "nanometer",
    "um": "micrometer",
    "µm": "micrometer",
    "micron": "micrometer",
    "mm": "millimeter",
    "cm": "centimeter",
    "m": "meter",
    "pixel": None,
    "voxel": None,
}


def level_factors(
    shape: Sequence[int], spacing: Sequence[float], smallest: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return the factor of each pyramid level to the one before, the first of them for level 1.

    An axis is halved while its spacing is below twice the smallest, so that voxels grow alike, until a
    level fits one block.

    Args:
        shape: spatial shape of level 0.
        spacing: voxel size per axis.
        smallest: a level that is not larger than this on any axis is the last.
    """
    size, step = list(shape), list(spacing)
    levels = []
    while any(n > s for n, s in zip(size, smallest, strict=True)):
        open_axes = [axis for axis, n in enumerate(size) if n > 1]
        finest = min(step[axis] for axis in open_axes)
        factors = tuple(
            2 if axis in open_axes and step[axis] < 2 * finest else 1 for axis in range(len(size))
        )
        size = [math.ceil(n / f) for n, f in zip(size, factors, strict=True)]
        step = [s * f for s, f in zip(step, factors, strict=True)]
        levels.append(factors)
    return levels


class ZarrOutput:
    """Arrays of a prediction: `<root>/<target>/<level>`, created if absent, opened if there.

    Single-channel targets have axes (z, y, x) or (y, x), others a channel axis in front.

    Args:
        root: the output group's folder.
        stored: what is stored of each target.
        shape: spatial shape of the output.
        block_shape: shape of a chunk.
        spacing: voxel size per axis.
        unit: unit of the spacing, or None.
        origin: first voxel of the output in the image, per axis.
        compress: "zstd", "lz4", "gzip" or "none".
        pyramid: whether coarser levels are made.
    """

    def __init__(
        self,
        root: Path,
        stored: Sequence[Stored],
        shape: tuple[int, ...],
        block_shape: tuple[int, ...],
        *,
        spacing: tuple[float, ...],
        unit: str | None = None,
        origin: tuple[int, ...] | None = None,
        compress: str = "zstd",
        pyramid: bool = True,
    ) -> None:
        self.root = root
        self.stored = {item.head.name: item for item in stored}
        self.shape, self.block_shape = shape, block_shape
        self.spacing, self.unit = spacing, unit
        self.origin = origin or (0,) * len(shape)
        self.factors = level_factors(shape, spacing, block_shape) if pyramid else []
        self._compress = compress
        self._arrays: dict[tuple[str, int], Any] = {}

    def create(self) -> None:
        """Create groups and arrays that are not there yet."""
        import zarr

        root = zarr.open_group(self.root, mode="a", zarr_format=3)
        root.attrs.update({"ome": {"version": OME_VERSION, "bioformats2raw.layout": 3}})
        series = root.require_group("OME")
        series.attrs.update({"ome": {"version": OME_VERSION, "series": list(self.stored)}})
        for name, stored in self.stored.items():
            group = root.require_group(name)
            group.attrs.update({"ome": {"version": OME_VERSION, "multiscales": [self._multiscale(stored)]}})
            for level in range(len(self.factors) + 1):
                if str(level) not in group:
                    self._create_array(group, stored, level)

    def _array(self, name: str, level: int) -> Any:
        """Return an array, opened where it is first used: by this process, or by one that was sent this object."""
        if (name, level) not in self._arrays:
            import zarr

            self._arrays[name, level] = zarr.open_array(self.root / name / str(level), mode="r+")
        return self._arrays[name, level]

    def _create_array(self, group: Any, stored: Stored, level: int) -> None:
        shape = self.level_shape(level)
        chunks = tuple(min(c, n) for c, n in zip(self.block_shape, shape, strict=True))
        axes = ["z", "y", "x"][-len(shape) :]
        if stored.channels > 1:
            shape, chunks, axes = (stored.channels, *shape), (stored.channels, *chunks), ["c", *axes]
        group.create_array(
            str(level),
            shape=shape,
            chunks=chunks,
            dtype=stored.dtype,
            dimension_names=axes,
            compressors=_compressors(self._compress, stored.dtype),
            fill_value=0,
        )

    def level_shape(self, level: int) -> tuple[int, ...]:
        """Return the spatial shape of a pyramid level."""
        shape = self.shape
        for factors in self.factors[:level]:
            shape = tuple(math.ceil(n / f) for n, f in zip(shape, factors, strict=True))
        return shape

    def level_scale(self, level: int) -> tuple[int, ...]:
        """Return voxels of level 0 per voxel of a level, per axis."""
        scale = (1,) * len(self.shape)
        for factors in self.factors[:level]:
            scale = tuple(s * f for s, f in zip(scale, factors, strict=True))
        return scale

    def _multiscale(self, stored: Stored) -> dict[str, Any]:
        names = ["z", "y", "x"][-len(self.shape) :]
        unit = _UNITS.get(self.unit, self.unit) if self.unit else None
        axes: list[dict[str, str]] = [
            {"name": name, "type": "space", **({"unit": unit} if unit else {})} for name in names
        ]
        lead = [1.0] if stored.channels > 1 else []
        if lead:
            axes.insert(0, {"name": "c", "type": "channel"})
        datasets = []
        for level in range(len(self.factors) + 1):
            scale = self.level_scale(level)
            # Means and first voxels alike: the centre of a coarse voxel lies between those it covers.
            shift = [
                (start + (0 if stored.is_labels else (f - 1) / 2)) * step
                for start, f, step in zip(self.origin, scale, self.spacing, strict=True)
            ]
            datasets.append(
                {
                    "path": str(level),
                    "coordinateTransformations": [
                        {
                            "type": "scale",
                            "scale": lead + [f * s for f, s in zip(scale, self.spacing, strict=True)],
                        },
                        {"type": "translation", "translation": [0.0] * len(lead) + shift},
                    ],
                }
            )
        return {"name": stored.head.name, "axes": axes, "datasets": datasets, "type": "mean"}

    def write(self, name: str, box: tuple[slice, ...], values: np.ndarray, level: int = 0) -> None:
        """Write stored values (channels, *box) of a target at a place."""
        array = self._array(name, level)
        if self.stored[name].channels > 1:
            array[(slice(None), *box)] = values
        else:
            array[box] = values[0]

    def write_channel(self, name: str, box: tuple[slice, ...], channel: int, values: np.ndarray) -> None:
        """Write one channel's stored values (*box) of a target at full resolution."""
        array = self._array(name, 0)
        array[(channel, *box) if self.stored[name].channels > 1 else box] = values

    def read(self, name: str, box: tuple[slice, ...], level: int = 0) -> np.ndarray:
        """Read stored values (channels, *box) of a target."""
        array = self._array(name, level)
        if self.stored[name].channels > 1:
            return np.asarray(array[(slice(None), *box)])
        return np.asarray(array[box])[None]

    def build_pyramid(self, workers: int = 1, coarsen: Coarsen | None = None) -> None:
        """Make the coarser levels from the finished level 0, chunk by chunk.

        Args:
            workers: threads.
            coarsen: makes a large level elsewhere; None to do it here.
        """
        for level in range(1, len(self.factors) + 1):
            if coarsen is not None and self.box_count(level) > FEW_BOXES:
                coarsen(level)
                continue
            with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="pyramid") as pool:
                running: deque[Future[None]] = deque()
                for name, box in self.boxes(level):
                    if len(running) > 2 * workers:
                        running.popleft().result()
                    running.append(pool.submit(self.coarsen, name, level, box))
                for future in running:
                    future.result()

    def box_count(self, level: int) -> int:
        """Return how many boxes `boxes` yields."""
        shape = self.level_shape(level)
        return len(self.stored) * math.prod(-(-n // c) for n, c in zip(shape, self.block_shape, strict=True))

    def boxes(self, level: int) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Yield every target with every chunk's place of a level."""
        shape = self.level_shape(level)
        counts = [-(-n // c) for n, c in zip(shape, self.block_shape, strict=True)]
        for name, *index in itertools.product(self.stored, *map(range, counts)):
            yield (
                name,
                tuple(
                    slice(i * c, min((i + 1) * c, n))
                    for i, c, n in zip(index, self.block_shape, shape, strict=True)
                ),
            )

    def coarsen(self, name: str, level: int, box: tuple[slice, ...]) -> None:
        """Write a box of a target's level from the level before it."""
        factors = self.factors[level - 1]
        finer = self.level_shape(level - 1)
        source = tuple(
            slice(part.start * f, min(part.stop * f, n))
            for part, f, n in zip(box, factors, finer, strict=True)
        )
        values = self.read(name, source, level - 1)
        self.write(name, box, self.stored[name].coarser(values, factors), level)


def _compressors(name: str, dtype: np.dtype) -> Any:
    from zarr.codecs import BloscCodec, GzipCodec

    if name == "none":
        return None
    if name == "gzip":
        return GzipCodec(level=5)
    settings: dict[str, Any] = {"cname": name, "shuffle": "bitshuffle" if dtype.itemsize > 1 else "noshuffle"}
    return BloscCodec(clevel=3, typesize=dtype.itemsize, **settings)
