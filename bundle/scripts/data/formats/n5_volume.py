"""Reads N5 datasets block by block, on disk or at a URL.

Source: https://github.com/saalfeldlab/n5#file-system-specification
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import digest, folder_fingerprint
from volumen.data.formats.axes import UNKNOWN, AxisMap, map_axes
from volumen.data.formats.byte_store import ByteStore, read_json
from volumen.data.formats.chunk_grid import read_chunks
from volumen.data.formats.urls import is_url
from volumen.data.formats.usual_names import choose_name
from volumen.data.formats.volumes import LazyVolume, Region, SingleLevelError, single_level
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.data.space.units import unit_name
from volumen.utils.errors import VolumenError, file_fault

ATTRIBUTES = "attributes.json"
_LEVEL = re.compile(r"(?:(.*)/)?s(\d+)")
_CODECS = {"raw": None, "gzip": "gzip", "bzip2": "bz2", "xz": "lzma", "blosc": "blosc", "zstd": "zstd"}
"""Names of numcodecs by the names of N5."""
_DEEPEST = 5


class N5Volume(LazyVolume):
    """An N5 dataset; blocks that are not stored read as 0.

    Args:
        path: folder or URL of the dataset.
        attributes: its attributes.
        axis_map: meaning of its axes in C order, which is the reverse of N5's.
        geometry: voxel size and place.
    """

    def __init__(
        self, path: str, attributes: Mapping[str, Any], axis_map: AxisMap, geometry: Geometry
    ) -> None:
        self._stored = np.dtype(attributes["dataType"]).newbyteorder(">")
        self._blocks = tuple(int(size) for size in attributes["blockSize"])[::-1]
        self._compression = dict(attributes["compression"])
        super().__init__(
            path, axis_map, self._stored, geometry=geometry, chunks=axis_map.of_space(self._blocks)
        )

    def _open(self) -> ByteStore:
        return ByteStore(self.path)

    def _read_stored(self, region: Region) -> np.ndarray:
        return read_chunks(region, self._blocks, self.dtype, self._load, self._key)

    def _key(self, index: tuple[int, ...]) -> tuple[Any, ...]:
        return (*self.handle.stamp(_block_name(index)), self.path)

    def _load(self, index: tuple[int, ...]) -> np.ndarray | None:
        store, name = self.handle, _block_name(index)
        data = store.get(name)
        if data is None:
            if not is_url(self.path) and store.get(ATTRIBUTES) is None:
                raise VolumenError(
                    self.path, "the volume has vanished while it was in use", remedy="bring it back"
                )
            return None
        try:
            block = self._decode(data)
            ends = zip(index, self._blocks, self.axis_map.stored_shape, strict=True)
            if any(size < min(b, n - i * b) for size, (i, b, n) in zip(block.shape, ends, strict=True)):
                raise ValueError(f"a block of shape {block.shape}")
            return block
        except Exception as error:
            raise file_fault(
                error, store.where(name), "this block cannot be read", remedy="copy the volume again"
            ) from error

    def _decode(self, data: bytes) -> np.ndarray:
        """Decode a block: a big-endian header with its shape, and the compressed voxels.

        A block at the end of an axis may be stored whole or cut.
        """
        mode, ndim = struct.unpack_from(">HH", data)
        shape = struct.unpack_from(f">{ndim}I", data, 4)
        if mode != 0 or ndim != len(self._blocks):
            raise ValueError(f"a block of mode {mode} with {ndim} axes")
        body = data[4 + 4 * ndim :]
        codec = _CODECS[self._compression["type"]]
        if codec is not None:
            import numcodecs

            zlib = codec == "gzip" and self._compression.get("useZlib")
            body = numcodecs.get_codec({"id": "zlib" if zlib else codec}).decode(body)
        block = np.frombuffer(body, self._stored, prod(shape)).reshape(shape[::-1])
        return block.astype(self.dtype)

    def fingerprint(self) -> str:
        """Return a hash of the attributes; on disk also of all files' names, sizes and times."""
        details = (self.shape, self.channels, self.dtype, self._blocks, sorted(self._compression.items()))
        if is_url(self.path):
            return digest([self.path, *details])
        return folder_fingerprint(Path(self.path), *details)


def open_n5(
    path: str, *, axes: str | None = None, level: int = 0, ndim: int | None = None, labels: bool = False
) -> N5Volume:
    """Open a dataset of an N5 container.

    Args:
        path: folder or URL of a dataset, of a group of levels `s0`, `s1`, ..., or of a container; of a container the
            only image, else the only one with a usual name (see `usual_names`).
        axes: letters of its axes in the order slowest first, as for `open_volume`.
        level: resolution level.
        ndim: number of spatial axes if known.
        labels: whether a label or mask is looked for.

    Raises:
        VolumenError: no dataset, several that could be meant, or one of a kind that is not read.
        SingleLevelError: there is no such level.
    """
    attributes = read_json(path, ATTRIBUTES) or {}
    group: Mapping[str, Any] = {}
    if "dimensions" not in attributes:
        path, attributes, group = _inside(path, attributes, level, labels)
    elif level:
        raise single_level(path, level)
    else:
        group = _group_of_level(path)
    _check(path, attributes)
    shape = tuple(int(size) for size in attributes["dimensions"])[::-1]
    axis_map = map_axes(path, shape, known=_axes_of(attributes, len(shape)), requested=axes, ndim=ndim)
    return N5Volume(path, attributes, axis_map, _geometry(attributes, group, axis_map, level))


def _block_name(index: tuple[int, ...]) -> str:
    return "/".join(str(i) for i in index[::-1])


def _check(path: str, attributes: Mapping[str, Any]) -> None:
    missing = [key for key in ("dimensions", "blockSize", "dataType", "compression") if key not in attributes]
    if missing:
        raise VolumenError(
            path, "its attributes are damaged", found=f"no {', '.join(missing)}", remedy="copy it again"
        )
    if attributes.get("isLabelMultiset"):
        raise VolumenError(
            path,
            expected="a label per voxel",
            found="Paintera's label multisets",
            remedy="convert it with paintera-convert to-scalar",
        )
    kind = attributes["compression"].get("type")
    if kind not in _CODECS:
        raise VolumenError(
            path,
            expected=f"blocks compressed by {', '.join(_CODECS)}",
            found=kind,
            remedy="save it again with gzip",
        )
    if np.dtype(attributes["dataType"]).kind not in "iuf":
        raise VolumenError(path, expected="numbers", found=attributes["dataType"], remedy="convert it")


def _inside(
    path: str, attributes: Mapping[str, Any], level: int, labels: bool
) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """Find the dataset of a level in a group: its path, its attributes, and those of the group of levels."""
    names = _level_names(attributes)
    if names is None and read_json(f"{path}/s0", ATTRIBUTES) is not None:
        names = _numbered(path)
    if names is None:
        found = _below(path)
        chosen = choose_name(path, found, labels, "dataset")
        inner = f"{path}/{chosen}"
        attributes = read_json(inner, ATTRIBUTES) or {}
        if "dimensions" in attributes:
            if level:
                raise single_level(inner, level)
            return inner, attributes, {}
        path, names = inner, _level_names(attributes) or _numbered(inner)
    if level >= len(names):
        raise SingleLevelError(
            path,
            expected=f"a level from 0 to {len(names) - 1}",
            found=level,
            remedy="set dataset_config.ome_zarr_resolution to 0",
        )
    inner = f"{path}/{names[level]}"
    return inner, read_json(inner, ATTRIBUTES) or {}, attributes


def _level_names(attributes: Mapping[str, Any]) -> list[str] | None:
    try:
        return [entry["path"] for entry in attributes["multiscales"][0]["datasets"]]
    except (KeyError, IndexError, TypeError):
        return None


def _numbered(path: str) -> list[str]:
    names: list[str] = []
    while read_json(f"{path}/s{len(names)}", ATTRIBUTES) is not None:
        names.append(f"s{len(names)}")
    return names


def _group_of_level(path: str) -> Mapping[str, Any]:
    """Return the attributes of the group of levels around a dataset called `s0`, ...; none around another one."""
    parent, _, name = path.rstrip("/").rpartition("/")
    return (read_json(parent, ATTRIBUTES) or {}) if parent and _LEVEL.fullmatch(name) else {}


def _below(path: str) -> dict[str, tuple[int, ...]]:
    """Return the datasets below a folder, and their shapes; the levels of an image count as one."""
    if is_url(path):
        raise VolumenError(
            path,
            expected="a dataset, or levels s0, s1, ...",
            found="an N5 group",
            remedy="give the URL of a dataset in it",
        )
    found: dict[str, tuple[int, ...]] = {}
    for where, folders, files in os.walk(path):
        inner = Path(where).relative_to(path).as_posix()
        folders.sort()
        if inner.count("/") + 1 >= _DEEPEST:
            folders.clear()
        if ATTRIBUTES not in files:
            continue
        try:
            shape = json.loads(Path(where, ATTRIBUTES).read_bytes()).get("dimensions")
        except (OSError, ValueError, AttributeError):
            continue
        if shape is not None:
            folders.clear()
            level = _LEVEL.fullmatch(inner)
            if level is None or level[1] is None or int(level[2]) == 0:
                found[level[1] if level and level[1] else inner] = tuple(shape[::-1])
    return found


def _axes_of(attributes: Mapping[str, Any], ndim: int) -> str | None:
    """Return a letter per axis in C order, as `axes` (of n5-ij, X first) or COSEM's `transform` states them."""
    transform = attributes.get("transform")
    if isinstance(transform, Mapping) and len(transform.get("axes", ())) == ndim:
        names = _in_c_order(transform)
    elif isinstance(attributes.get("axes"), list) and len(attributes["axes"]) == ndim:
        names = attributes["axes"][::-1]
    else:
        return None
    letters = [str(name).lower()[:1] for name in names]
    return "".join(letter if letter in "tczyx" else UNKNOWN for letter in letters)


def _in_c_order(transform: Mapping[str, Any]) -> list[Any]:
    axes = list(transform["axes"])
    return axes[::-1] if transform.get("ordering") == "F" else axes


def _geometry(
    attributes: Mapping[str, Any], group: Mapping[str, Any], axis_map: AxisMap, level: int
) -> Geometry:
    """Return voxel size and place.

    Conventions: `transform` (COSEM, as stated), `pixelResolution` (N5 Viewer) or `resolution` (Paintera, n5-ij), in the
    order X, Y, Z, each of the dataset or of its group of levels. A size of the group, and `pixelResolution`, are of
    level 0 and are multiplied by the `downsamplingFactors` of the dataset.
    """
    transform = attributes.get("transform")
    if isinstance(transform, Mapping) and "scale" in transform and "axes" in transform:
        return _of_transform(transform, axis_map)
    factors = _factors(attributes, group, level)
    for source, scaled in ((attributes, False), (group, True)):
        stated = source.get("pixelResolution")
        if stated is not None:
            values = stated.get("dimensions") if isinstance(stated, Mapping) else stated
            unit = stated.get("unit") if isinstance(stated, Mapping) else source.get("unit")
            return _scaled(values, unit, factors, source.get("offset"), axis_map)
        if "resolution" in source:
            values, units = source["resolution"], source.get("units", source.get("unit"))
            unit = units[0] if isinstance(units, list) and len(set(units)) == 1 else units
            return _scaled(values, unit, factors if scaled else None, source.get("offset"), axis_map)
    return Geometry()


def _of_transform(transform: Mapping[str, Any], axis_map: AxisMap) -> Geometry:
    axes = [str(axis).lower()[:1] for axis in transform["axes"]]
    wanted = ["z", "y", "x"][-len(axis_map.shape) :]
    if not set(wanted) <= set(axes) or len(transform["scale"]) != len(axes):
        return Geometry()

    def ordered(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[axes.index(axis)] for axis in wanted]

    units = ordered(transform.get("units"))
    named = None if units is None else [unit_name(unit) for unit in units]
    scale = ordered(transform["scale"])
    assert scale is not None
    return stated_geometry([float(size) for size in scale], named, origin=ordered(transform.get("translate")))


def _factors(attributes: Mapping[str, Any], group: Mapping[str, Any], level: int) -> Sequence[float] | None:
    own = attributes.get("downsamplingFactors")
    if own is not None:
        return own
    levels = group.get("scales", group.get("downsamplingFactors"))
    return levels[level] if isinstance(levels, list) and level < len(levels) else None


def _scaled(
    values: Any, unit: Any, factors: Sequence[float] | None, offset: Any, axis_map: AxisMap
) -> Geometry:
    """Return the geometry of sizes in the order (X, Y, Z), times the factors of a level."""
    ndim = len(axis_map.shape)
    if not isinstance(values, list) or len(values) < ndim:
        return Geometry()
    sizes = [float(value) for value in values[:ndim]]
    by = [float(f) for f in factors[:ndim]] if factors is not None and len(factors) >= ndim else [1.0] * ndim
    start = [float(value) for value in offset[:ndim]] if isinstance(offset, list) else [0.0] * ndim
    # The centre of a coarse voxel lies between the centres of the voxels that it covers.
    place = [o + (f - 1) / 2 * size for o, f, size in zip(start, by, sizes, strict=True)]
    moved = isinstance(offset, list) or any(f != 1 for f in by)
    return stated_geometry(
        [size * f for size, f in zip(sizes, by, strict=True)][::-1],
        unit_name(unit),
        origin=place[::-1] if moved else None,
    )
