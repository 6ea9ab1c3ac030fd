"""Zarr v2 and v3 arrays, plain groups and OME-Zarr groups, on disk or at a URL."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import digest, file_fingerprint, folder_fingerprint
from volumen.data.formats.axes import AxisMap, map_axes
from volumen.data.formats.urls import is_url
from volumen.data.formats.volumes import LazyVolume, Region, single_level
from volumen.data.formats.zarr_arrays.chunks import (
    ChunkReader,
    check_present,
    chunk_reader,
    metadata_file,
    remedy_for,
)
from volumen.data.formats.zarr_arrays.ome import (
    LevelInfo,
    label_names,
    level_info,
    multiscale_of,
    ome_attributes,
)
from volumen.data.formats.zarr_arrays.remote_chunks import chunks_in, fetch_region
from volumen.data.formats.zarr_arrays.zipped import open_zipped, split_archive
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.data.space.units import unit_name
from volumen.utils.errors import VolumenError, file_fault, is_defect
from volumen.utils.terminal.text import counted

_MOST_NAMED, _DEEPEST = 6, 4
"""Images of a nested group that a message names, and how many levels of groups are looked into."""


class ZarrVolume(LazyVolume):
    """A zarr array. Chunks that are not stored read as the fill value, as zarr defines.

    Chunks fetched from a URL are kept (see `block_cache`) on the understanding that they do not change.
    """

    def __init__(self, path: str, array: Any, axis_map: AxisMap, **known: Any) -> None:
        super().__init__(path, axis_map, array.dtype, chunks=axis_map.of_space(array.chunks), **known)
        self._stored_chunks = tuple(array.chunks)
        self._metadata = digest([array.metadata.to_dict()])
        archive = split_archive(path)
        self._archive = None if archive is None else str(archive[0])
        self._witness = None if is_url(path) else self._archive or metadata_file(Path(path))

    def _open(self) -> tuple[Any, ChunkReader | None]:
        array = _open_node(self.path)
        return array, chunk_reader(array)

    def _read_stored(self, region: Region) -> np.ndarray:
        array, reader = self.handle
        if reader is not None:
            return reader.read(region)
        try:
            if is_url(self.path) or self._archive is not None:
                return fetch_region(array, region, (self.path, self.fingerprint()))
            values = np.asarray(array[region])
        except Exception as error:
            raise self._read_error(region, error) from error
        if self._witness is not None:
            check_present(self.path, self._witness)
        return values

    def _read_error(self, region: Region, error: Exception) -> VolumenError:
        """Find the chunk that cannot be read, among those that the region touches."""
        for chunk in chunks_in(region, self._stored_chunks, self.axis_map.stored_shape):
            try:
                self.handle[0][chunk]
            except Exception as cause:
                place = ", ".join(f"{part.start}:{part.stop}" for part in chunk)
                remedy = "check the URL and the network" if is_url(self.path) else remedy_for(cause)
                return file_fault(cause, self.path, f"chunk [{place}] cannot be read", remedy=remedy)
        return file_fault(error, self.path, "cannot be read", remedy="try again")

    def fingerprint(self) -> str:
        """Return a hash of the metadata and of all chunks' sizes and times; of a URL, of its text and metadata.

        Of a zip archive, of the metadata and of the archive's size, time and first bytes.
        """
        if is_url(self.path):
            return digest([self.path, self._metadata])
        if self._archive is not None:
            return file_fingerprint(Path(self._archive), self._metadata)
        return folder_fingerprint(Path(self.path), self._metadata)


def open_zarr(path: str, *, axes: str | None = None, level: int = 0, ndim: int | None = None) -> ZarrVolume:
    """Open a zarr array, the only array of a plain group, or a level of an OME-Zarr group.

    Args:
        path: folder or URL of the array or group.
        axes: letters of the stored axes, see `open_volume`.
        level: resolution level of an OME-Zarr image; a bare array has level 0 only.
        ndim: number of spatial axes, where known.
    """
    import zarr

    node = _open_node(path)
    info: LevelInfo | None = None
    if isinstance(node, zarr.Group):
        path, node, info = _array_of(path, node, level)
    elif level:
        raise single_level(path, level)
    else:
        info = _level_of_group(path)
    _check_dtype(path, node.dtype)
    known = info.axes if info else _dimension_names(node)
    if known is not None and len(known) != node.ndim:
        raise VolumenError(
            path, expected=f"{len(known)} axes ({known})", found=f"an array of shape {node.shape}"
        )
    axis_map = map_axes(path, node.shape, known=known, requested=axes, ndim=ndim)
    geometry = _plain_geometry(node.attrs, axis_map) if info is None else info.geometry(axis_map)
    return ZarrVolume(path, node, axis_map, geometry=geometry)


def group_labels(path: str) -> dict[str, str]:
    """Return names and paths of the labels in an OME-Zarr image's own `labels/` group, if it has one."""
    import zarr

    try:
        if split_archive(path) is not None:
            group = _open_node(_join(path, "labels"))
        else:
            group = zarr.open_group(zarr_store(_join(path, "labels")), mode="r")
        names = label_names(group.attrs.asdict()) or sorted(group.group_keys())
    except Exception as error:
        if is_defect(error):
            raise
        return {}  # no such group, or an array, or not even zarr: opening the image itself will tell
    return {name: _join(path, f"labels/{name}") for name in names}


def zarr_store(path: str) -> Any:
    """Return what zarr is to open: the URL, or the folder, which zarr would take for a URL if its name held `::`."""
    return path if is_url(path) else Path(path)


def _open_node(path: str) -> Any:
    import zarr

    archive = split_archive(path)
    if archive is not None:
        return open_zipped(*archive)
    try:
        return zarr.open(zarr_store(path), mode="r")
    except (FileNotFoundError, KeyError) as error:
        if isinstance(error, KeyError) and not is_url(path):  # a key of its metadata is missing
            raise file_fault(
                error, path, "its zarr metadata cannot be read", remedy="write it again"
            ) from error
        slices = "check the URL; a folder of slices is found only on a server that lists it"
        remedy = slices if is_url(path) else "check the path"
        raise VolumenError(path, "no zarr array or group there", remedy=remedy) from error
    except ImportError as error:
        remedy = "pip install 'volumen[remote]', or the package that it names"
        raise VolumenError(path, f"URLs of this kind need a package ({error})", remedy=remedy) from error
    except Exception as error:
        remedy = "check the URL and the network" if is_url(path) else "write it again"
        raise file_fault(error, path, "its zarr metadata cannot be read", remedy=remedy) from error


def _array_of(path: str, group: Any, level: int) -> tuple[str, Any, LevelInfo | None]:
    """Find the array of a group: its path, itself, and what OME metadata say of it."""
    attributes = group.attrs.asdict()
    multiscale = multiscale_of(attributes)
    if multiscale is not None:
        info = level_info(path, multiscale, level)
        inner = _join(path, info.path)
        return inner, _open_node(inner), info
    if "plate" in ome_attributes(attributes) or "well" in ome_attributes(attributes):
        raise VolumenError(
            path, expected="an image", found="an OME-Zarr plate", remedy="give the path of one field"
        )
    arrays = dict(group.arrays())
    if str(level) in arrays:
        return _join(path, str(level)), arrays[str(level)], None
    if len(arrays) == 1 and level == 0:
        name, array = next(iter(arrays.items()))
        return _join(path, name), array, None
    if not arrays and "0" in group:
        # The layout of bioformats2raw: one multiscale image per numbered group.
        return _array_of(_join(path, "0"), group["0"], level)
    inside = sorted(arrays) or list(islice(_images_below(group), _MOST_NAMED))
    if not inside:
        raise VolumenError(
            path, expected="an array", found="a zarr group with no array", remedy="write it again"
        )
    raise VolumenError(
        path,
        expected="one array or OME-Zarr multiscales metadata",
        found=f"{counted(len(inside), 'array')}: {', '.join(inside)}",
        remedy=f"give the path of one, such as {_join(path, inside[0])}, or put a link to it in the group's place",
    )


def _level_of_group(path: str) -> LevelInfo | None:
    """Return what the OME-Zarr group around an array says of it; None where there is none, or at a URL."""
    import zarr

    parent, _, name = path.rstrip("/").rpartition("/")
    if is_url(path) or not parent or not name:
        return None
    try:
        if split_archive(path) is not None:
            multiscale = multiscale_of(_open_node(parent).attrs.asdict())
        else:
            multiscale = multiscale_of(zarr.open_group(zarr_store(parent), mode="r").attrs.asdict())
        for level, entry in enumerate(multiscale["datasets"] if multiscale else ()):
            if entry["path"] == name:
                return level_info(parent, multiscale or {}, level)
    except Exception:  # no group, or not one of OME-Zarr: the array by itself is complete
        return None
    return None


def _images_below(group: Any, prefix: str = "", depth: int = _DEEPEST) -> Iterator[str]:
    """Yield the paths of images in the groups of a group: multiscale images, and arrays of plain groups."""
    for name, inner in sorted(group.groups()):
        if multiscale_of(inner.attrs.asdict()) is not None:
            yield f"{prefix}{name}"
            continue
        yield from (f"{prefix}{name}/{array}" for array in sorted(inner.array_keys()))
        if depth > 1:
            yield from _images_below(inner, f"{prefix}{name}/", depth - 1)


def _join(path: str, inner: str) -> str:
    return f"{path.rstrip('/')}/{inner.strip('/')}"


def _dimension_names(array: Any) -> str | None:
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if not names:
        return None
    letters = [str(name or "?").lower() for name in names]
    letters = [{"channel": "c", "channels": "c", "time": "t"}.get(name, name) for name in letters]
    return "".join(name if name in list("tczyx") else "?" for name in letters)


def _plain_geometry(attributes: Any, axis_map: AxisMap) -> Geometry:
    """Read the voxel size that tools without OME metadata leave in `voxel_size` or `resolution`.

    Beside it funlib and gunpowder write `offset`, the place of the first voxel, and `units`.
    """
    ndim = len(axis_map.spatial)
    sizes = _numbers(attributes.get("voxel_size"), ndim) or _numbers(attributes.get("resolution"), ndim)
    units = attributes.get("units", attributes.get("unit"))
    if isinstance(units, list | tuple):
        units = [unit_name(unit) for unit in units] if len(units) == ndim else None
    else:
        units = unit_name(units)
    return stated_geometry(sizes, units, origin=_numbers(attributes.get("offset"), ndim))


def _numbers(values: Any, count: int) -> tuple[float, ...] | None:
    if isinstance(values, list | tuple) and len(values) == count:
        return tuple(float(value) for value in values)
    return None


def _check_dtype(path: str, dtype: np.dtype) -> None:
    if np.dtype(dtype).kind not in "biuf":
        raise VolumenError(path, expected="numbers", found=f"values of type {dtype}", remedy="convert it")
