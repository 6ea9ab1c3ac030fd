"""OME-Zarr 0.5 output: one multiscale image per target in a group, written block by block."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.space.units import unit_name
from volumen.inference.output.chunk_files import ChunkFiles, numcodec, zarr_codec
from volumen.inference.output.ome_metadata import OME_VERSION, image_label, ome_xml, omero
from volumen.inference.output.stored import OutputSpec
from volumen.utils.files.atomic import write_atomically

LABELS = "labels"
"""The group of an OME-Zarr container that holds its label maps."""


def target_group(stored: OutputSpec) -> str:
    """Return the path of a target's group in the container: label maps of one channel are stored in `labels`."""
    return f"{LABELS}/{stored.head.name}" if is_label_map(stored) else stored.head.name


def is_label_map(stored: OutputSpec) -> bool:
    """Whether a target is stored as an OME-Zarr label; overlapping classes are stored as an image with channels."""
    return stored.is_labels and stored.channels == 1


def find_target(root: Path, name: str) -> Path:
    """Return the folder of a predicted target in a container, in `labels` or beside it."""
    inner = root / LABELS / name
    return inner if inner.exists() else root / name


def level_factors(
    shape: Sequence[int], spacing: Sequence[float], smallest: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return the factors between each pyramid level and the previous one, starting with level 1.

    An axis is halved if its spacing is below twice the smallest, so that voxels become isotropic. The last level fits
    in one block.

    Args:
        shape: spatial shape of level 0.
        spacing: voxel size per axis.
        smallest: a level that is not larger than this along any axis is the last.
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
    """The arrays of a prediction, which are created if they do not exist.

    Their paths are `<root>/<target>/<level>`, for label maps `<root>/labels/<target>/<level>`. Targets with one channel
    have the axes (z, y, x) or (y, x), others a channel axis before these.

    Args:
        root: the output group's folder.
        stored: how each target is stored.
        shape: spatial shape of the output.
        block_shape: shape of a chunk.
        spacing: voxel size per axis.
        unit: unit of the spacing, or None.
        origin: first voxel of the output in the image, per axis.
        place: coordinates of the image's first voxel in space, per axis in `unit`; None: 0.
        source: path of the image's OME-Zarr group, to which labels refer; None for an image of another format.
        classes: names of classes by target.
        compress: "zstd", "lz4", "gzip" or "none".
        pyramid: whether coarser levels are written.
    """

    def __init__(
        self,
        root: Path,
        stored: Sequence[OutputSpec],
        shape: tuple[int, ...],
        block_shape: tuple[int, ...],
        *,
        spacing: tuple[float, ...],
        unit: str | None = None,
        origin: tuple[int, ...] | None = None,
        place: tuple[float, ...] | None = None,
        source: str | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
        compress: str = "zstd",
        pyramid: bool = True,
    ) -> None:
        self.root = root
        self.stored = {item.head.name: item for item in stored}
        self.shape, self.block_shape = shape, block_shape
        self.spacing, self.unit = spacing, unit_name(unit)
        self.origin = origin or (0,) * len(shape)
        self.place = place or (0.0,) * len(shape)
        self.groups = {name: target_group(item) for name, item in self.stored.items()}
        self._source = source
        self._classes = classes or {}
        self.factors = level_factors(shape, spacing, block_shape) if pyramid else []
        self._compress = compress
        self._chunk_files: dict[tuple[str, int], ChunkFiles] = {}

    def create(self) -> None:
        """Create groups and arrays that do not exist yet."""
        import zarr

        root = zarr.open_group(self.root, mode="a", zarr_format=3)
        root.attrs.update({"ome": {"version": OME_VERSION, "bioformats2raw.layout": 3}})
        series = root.require_group("OME")
        series.attrs.update({"ome": {"version": OME_VERSION, "series": list(self.groups.values())}})
        images = {self.groups[name]: stored for name, stored in self.stored.items()}
        write_atomically(
            self.root / "OME" / "METADATA.ome.xml", ome_xml(images, self.shape, self.spacing, self.unit)
        )
        maps = [name for name, stored in self.stored.items() if is_label_map(stored)]
        if maps:
            root.require_group(LABELS).attrs.update({"ome": {"version": OME_VERSION, "labels": maps}})
        for name, stored in self.stored.items():
            group = root.require_group(self.groups[name])
            group.attrs.update({"ome": self._attributes(stored)})
            for level in range(len(self.factors) + 1):
                if str(level) not in group:
                    self._create_array(group, stored, level)

    def _attributes(self, stored: OutputSpec) -> dict[str, Any]:
        """Return the OME metadata of a target's group."""
        found = {"version": OME_VERSION, "multiscales": [self._multiscale(stored)]}
        if not is_label_map(stored):
            return {**found, "omero": omero(stored)}
        label = image_label(stored, self._classes.get(stored.head.name))
        if self._source is not None:
            here = self.root / self.groups[stored.head.name]
            label["source"] = {"image": Path(os.path.relpath(self._source, here)).as_posix()}
        return {**found, "image-label": label}

    def _create_array(self, group: Any, stored: OutputSpec, level: int) -> None:
        shape, chunks = self._stored_shapes(stored, level)
        group.create_array(
            str(level),
            shape=shape,
            chunks=chunks,
            dtype=stored.dtype,
            dimension_names=self._axes(stored),
            compressors=zarr_codec(self._compress, stored.dtype),
            fill_value=0,
        )

    def _axes(self, stored: OutputSpec) -> list[str]:
        return [*(["c"] if stored.channels > 1 else []), *["z", "y", "x"][-len(self.shape) :]]

    def _stored_shapes(self, stored: OutputSpec, level: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of an array and of its chunks."""
        shape = self.level_shape(level)
        chunks = tuple(min(c, n) for c, n in zip(self.block_shape, shape, strict=True))
        lead = (stored.channels,) if stored.channels > 1 else ()
        return (*lead, *shape), (*lead, *chunks)

    def _files(self, name: str, level: int) -> ChunkFiles:
        if (name, level) not in self._chunk_files:
            stored = self.stored[name]
            self._chunk_files[name, level] = ChunkFiles(
                self.root / self.groups[name] / str(level),
                *self._stored_shapes(stored, level),
                stored.dtype,
                numcodec(self._compress, stored.dtype),
            )
        return self._chunk_files[name, level]

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

    def _multiscale(self, stored: OutputSpec) -> dict[str, Any]:
        names = ["z", "y", "x"][-len(self.shape) :]
        unit = self.unit
        axes: list[dict[str, str]] = [
            {"name": name, "type": "space", **({"unit": unit} if unit else {})} for name in names
        ]
        lead = [1.0] if stored.channels > 1 else []
        if lead:
            axes.insert(0, {"name": "c", "type": "channel"})
        datasets = []
        for level in range(len(self.factors) + 1):
            scale = self.level_scale(level)
            # The centre of a coarse voxel lies between the centres of the voxels that it covers.
            shift = [
                place + (start + (f - 1) / 2) * step
                for place, start, f, step in zip(self.place, self.origin, scale, self.spacing, strict=True)
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
        kind = "mode" if stored.is_labels else "mean"
        return {"name": stored.head.name, "axes": axes, "datasets": datasets, "type": kind}

    def write(self, name: str, box: tuple[slice, ...], values: np.ndarray, level: int = 0) -> None:
        """Write stored values (channels, *box) of a target into a box."""
        if self.stored[name].channels > 1:
            self._files(name, level).write((slice(0, len(values)), *box), values)
        else:
            self._files(name, level).write(box, values[0])

    def read(self, name: str, box: tuple[slice, ...], level: int = 0) -> np.ndarray:
        """Read stored values (channels, *box) of a target."""
        channels = self.stored[name].channels
        if channels > 1:
            return self._files(name, level).read((slice(0, channels), *box))
        return self._files(name, level).read(box)[None]

    def box_count(self, level: int) -> int:
        """Return the number of chunks of a level, summed over the targets."""
        return len(self.stored) * math.prod(self._chunk_counts(level))

    def boxes_with_content(self, level: int) -> tuple[int, ...]:
        """Return the numbers of a level's chunks that overlap a stored chunk of the previous level.

        The other chunks are 0 and need no file.
        """
        counts = self._chunk_counts(level)
        found: set[int] = set()
        for target, (name, stored) in enumerate(self.stored.items()):
            lead = int(stored.channels > 1)
            for index in self._files(name, level - 1).stored():
                coarse = [
                    min(i // f, n - 1) for i, f, n in zip(index[lead:], self.factors[level - 1], counts)
                ]
                found.add(target * math.prod(counts) + int(np.ravel_multi_index(coarse, counts)))
        return tuple(sorted(found))

    def box(self, level: int, number: int) -> tuple[str, tuple[slice, ...]]:
        """Return the target and the box of a chunk of a level from its number."""
        counts = self._chunk_counts(level)
        target, number = divmod(number, math.prod(counts))
        index = np.unravel_index(number, counts)
        return list(self.stored)[target], tuple(
            slice(int(i) * c, min((int(i) + 1) * c, n))
            for i, c, n in zip(index, self.block_shape, self.level_shape(level), strict=True)
        )

    def _chunk_counts(self, level: int) -> tuple[int, ...]:
        return tuple(-(-n // c) for n, c in zip(self.level_shape(level), self.block_shape, strict=True))

    def coarsened(self, name: str, level: int, box: tuple[slice, ...]) -> np.ndarray:
        """Return the values of a box of a target's level, computed from the previous level."""
        factors = self.factors[level - 1]
        finer = self.level_shape(level - 1)
        source = tuple(
            slice(part.start * f, min(part.stop * f, n))
            for part, f, n in zip(box, factors, finer, strict=True)
        )
        return self.stored[name].coarser(self.read(name, source, level - 1), factors)
