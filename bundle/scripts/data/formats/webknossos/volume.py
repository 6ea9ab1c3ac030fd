"""Reads layers of WEBKNOSSOS datasets: arrays in zarr or WKW, cropped to the layer's bounding box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import digest, folder_fingerprint
from volumen.data.formats.axes import AxisMap
from volumen.data.formats.byte_store import read_json
from volumen.data.formats.urls import is_url
from volumen.data.formats.volumes import LazyVolume, Region, SingleLevelError
from volumen.data.formats.webknossos.properties import (
    PROPERTIES,
    SEGMENTATION,
    Layer,
    Mag,
    Properties,
    mag_name,
    parse_properties,
)
from volumen.data.formats.webknossos.wkw import WkwReader
from volumen.data.formats.zarr_arrays.volume import open_zarr
from volumen.data.space.geometry import stated_geometry
from volumen.data.space.units import unit_name
from volumen.utils.errors import VolumenError

_ZARR = ("zarr", "zarr3")


class _ZarrLayer:
    """A layer stored as zarr, in absolute coordinates; voxels beyond the array are 0."""

    block: int | None = None

    def __init__(self, path: str, axes: str) -> None:
        self._volume = open_zarr(path, axes=axes, ndim=3)
        self.dtype, self.channels, self.chunks = (
            self._volume.dtype,
            self._volume.channels,
            self._volume.chunks,
        )

    def read(self, region: Region) -> np.ndarray:
        out = np.zeros((self.channels, *(part.stop - part.start for part in region)), self.dtype)
        stored = tuple(
            slice(min(part.start, n), min(part.stop, n))
            for part, n in zip(region, self._volume.shape, strict=True)
        )
        inside = tuple(slice(0, part.stop - part.start) for part in stored)
        out[(slice(None), *inside)] = self._volume.read(stored)
        return out


class WebknossosVolume(LazyVolume):
    """A magnification of a layer, read as (channels, Z, Y, X).

    Args:
        dataset: folder or URL of the dataset.
        properties: its description.
        layer: the layer.
        mag: the magnification.
        ndim: number of spatial axes if known.
    """

    def __init__(
        self, dataset: str, properties: Properties, layer: Layer, mag: Mag, ndim: int | None
    ) -> None:
        self._mag, self._format = mag, layer.format
        path = f"{dataset}/{mag.path}"
        self.path = path
        source = self._open()
        start = [low // factor for low, factor in zip(layer.start, mag.factor, strict=True)]
        stop = [
            -(-(low + size) // factor)
            for low, size, factor in zip(layer.start, layer.size, mag.factor, strict=True)
        ]
        self._start = tuple(start[::-1])
        extents = [b - a for a, b in zip(start, stop, strict=True)]
        shape = (source.channels, *extents[::-1])
        spatial = (2, 3) if shape[1] == 1 and ndim in (None, 2) else (1, 2, 3)
        if ndim is not None and len(spatial) != ndim:
            raise VolumenError(path, expected=f"{ndim} spatial axes", found=f"shape {shape[1:]}")
        # The centre of a coarse voxel lies between the centres of the voxels that it covers.
        origin = [
            (first * factor + (factor - 1) / 2) * size
            for first, factor, size in zip(start, mag.factor, properties.spacing, strict=True)
        ]
        sizes = [factor * size for factor, size in zip(mag.factor, properties.spacing, strict=True)]
        axes = len(spatial)
        geometry = stated_geometry(
            sizes[::-1][-axes:], unit_name(properties.unit), origin=origin[::-1][-axes:]
        )
        chunks = (source.block,) * 3 if source.block else source.chunks
        super().__init__(
            path,
            AxisMap(shape, spatial, 0),
            source.dtype,
            geometry=geometry,
            chunks=tuple(chunks[-axes:]),
        )

    def _open(self) -> Any:
        if self._format == "wkw":
            return WkwReader(self.path)
        return _ZarrLayer(self.path, self._mag.axes)

    def _read_stored(self, region: Region) -> np.ndarray:
        moved = tuple(
            slice(part.start + first, part.stop + first)
            for part, first in zip(region[1:], self._start, strict=True)
        )
        return self.handle.read(moved)[region[0]]

    def fingerprint(self) -> str:
        """Return a hash of the layer's place; on disk also of all files' names, sizes and times."""
        details = (self._start, self.shape, self.channels, self.dtype)
        if is_url(self.path):
            return digest([self.path, *details])
        return folder_fingerprint(Path(self.path), *details)


def open_webknossos(
    path: str, *, level: int = 0, ndim: int | None = None, labels: bool = False
) -> WebknossosVolume:
    """Open a layer of a dataset.

    Args:
        path: folder or URL of the dataset, or of a layer in it.
        level: 0 for the finest magnification of the dataset, 1 for the next, ...
        ndim: number of spatial axes if known.
        labels: whether a segmentation is looked for, of a dataset with layers of both kinds.

    Raises:
        VolumenError: no such layer, several that could be meant, or a format that is not read.
        SingleLevelError: the layer has no such magnification.
    """
    dataset, content, name = path.rstrip("/"), read_json(path, PROPERTIES), None
    if content is None:
        dataset, _, name = dataset.rpartition("/")
        content = read_json(dataset, PROPERTIES)
    if content is None:
        raise VolumenError(
            path, expected=f"a dataset with {PROPERTIES}", found="none", remedy="check the path"
        )
    properties = parse_properties(dataset, content)
    layer = _layer(dataset, properties, name, labels)
    if layer.format not in ("wkw", *_ZARR):
        raise VolumenError(
            f"{dataset}/{layer.name}",
            expected="a layer in zarr or WKW",
            found=layer.format,
            remedy="give the path of its magnification",
        )
    return WebknossosVolume(dataset, properties, layer, _mag(dataset, properties, layer, level), ndim)


def _layer(dataset: str, properties: Properties, name: str | None, labels: bool) -> Layer:
    layers = {layer.name: layer for layer in properties.layers}
    if name is not None and name in layers:
        return layers[name]
    listed = ", ".join(f"{layer.name} ({layer.category})" for layer in properties.layers) or "none"
    if name is not None:
        raise VolumenError(f"{dataset}/{name}", expected=f"a layer: {listed}", found="none of them")
    fitting = [layer for layer in properties.layers if (layer.category == SEGMENTATION) == labels]
    fitting = fitting or list(properties.layers)
    if len(fitting) != 1:
        raise VolumenError(
            dataset,
            expected="one layer",
            found=listed,
            remedy=f"give the path of one, such as {dataset}/{fitting[0].name}"
            if fitting
            else "write it again",
        )
    return fitting[0]


def _mag(dataset: str, properties: Properties, layer: Layer, level: int) -> Mag:
    factors = properties.factors
    wanted = factors[level] if level < len(factors) else None
    found = next((mag for mag in layer.mags if mag.factor == wanted), None)
    if found is None:
        missing = f"level {level}" if wanted is None else f"magnification {mag_name(wanted)} (level {level})"
        raise SingleLevelError(
            f"{dataset}/{layer.name}",
            expected=missing,
            found=f"magnifications {', '.join(mag.name for mag in layer.mags) or 'none'}",
            remedy="choose another level, or downsample the layer in WEBKNOSSOS",
        )
    return found
