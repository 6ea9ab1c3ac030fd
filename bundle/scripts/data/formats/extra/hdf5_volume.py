"""Reads datasets of HDF5 files: ilastik, PyTorch Connectomics, CREMI, Fiji, BigDataViewer, and others."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import file_fingerprint
from volumen.data.formats.axes import UNKNOWN, AxisMap, map_axes
from volumen.data.formats.extra.library import library
from volumen.data.formats.usual_names import IMAGE_NAMES, LABEL_NAMES, listed
from volumen.data.formats.volumes import LazyVolume, Region, SingleLevelError, single_level
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.data.space.units import unit_name
from volumen.utils.errors import VolumenError, file_fault

_BIG_DATA_VIEWER = re.compile(r"t(\d+)/s(\d+)/(\d+)/cells")
_INSIDE = ":/"
_CREMI = "/volumes/"
_CACHE_BYTES = 32 * 2**20
"""Memory for decoded chunks of an open dataset."""


class Hdf5Volume(LazyVolume):
    """A dataset of an HDF5 file; only the chunks of a region are read.

    Args:
        path: the file.
        name: path of the dataset in the file.
        dataset: the open dataset, for its shape and attributes.
        axis_map: meaning of its axes.
    """

    def __init__(self, path: Path, name: str, dataset: Any, axis_map: AxisMap) -> None:
        chunks = axis_map.of_space(dataset.chunks) if dataset.chunks else None
        dtype = np.dtype(np.uint8) if dataset.dtype == np.bool_ else dataset.dtype
        super().__init__(
            f"{path}{_INSIDE}{name}",
            axis_map,
            dtype,
            geometry=_geometry(path, dataset, axis_map),
            chunks=chunks,
        )

    def _open(self) -> Any:
        file, _, name = self.path.rpartition(_INSIDE)
        return _open_file(file, Path(file))[name]

    def _read_stored(self, region: Region) -> np.ndarray:
        try:
            return np.asarray(self.handle[region])
        except Exception as error:
            raise file_fault(
                error,
                self.path,
                "cannot be decoded",
                remedy="copy it again, or install the filter of its compression: pip install 'volumen[formats]'",
            ) from error

    def fingerprint(self) -> str:
        """Return a hash of the file's size, modification time and first bytes, and of the dataset's name."""
        file, _, name = self.path.rpartition(_INSIDE)
        return file_fingerprint(Path(file), name, self.shape, self.channels, self.dtype)


def open_hdf5(
    path: Path,
    name: str | None = None,
    *,
    axes: str | None = None,
    level: int = 0,
    ndim: int | None = None,
    labels: bool = False,
) -> Hdf5Volume:
    """Open a dataset of an HDF5 file.

    Args:
        path: the file.
        name: path of the dataset in the file; None: the only one that holds a volume, else the only one with one of
            the usual names (see `usual_names`).
        axes: letters of its axes, as for `open_volume`.
        level: resolution level, of a file of BigDataViewer.
        ndim: number of spatial axes if known.
        labels: whether a label or mask is looked for.

    Raises:
        VolumenError: no such dataset, several that could be meant, or a file that cannot be read.
    """
    file = _open_file(str(path), path)
    try:
        candidates = _candidates(file)
        name = name or _choose(path, candidates, level, labels)
        if name not in candidates:
            raise VolumenError(
                f"{path}:/{name}",
                expected=f"a dataset of numbers with 2 axes or more: {_listed(path, candidates)}",
                found="none",
            )
        pyramid = _BIG_DATA_VIEWER.fullmatch(name)
        if level and (pyramid is None or int(pyramid[3]) != level):
            raise single_level(f"{path}:/{name}", level)
        dataset = file[name]
        axis_map = map_axes(
            f"{path}:/{name}", dataset.shape, known=_axes_of(dataset), requested=axes, ndim=ndim
        )
        return Hdf5Volume(path, name, dataset, axis_map)
    finally:
        file.close()


def _open_file(path: str, where: Path) -> Any:
    h5py = library("h5py", where)
    with suppress(ImportError):
        import hdf5plugin  # noqa: F401  (its import registers the filters of compressed datasets)
    try:
        # Where a file system has no locks, the file is read without; a program that writes it still keeps it locked.
        return h5py.File(path, "r", locking="best-effort", rdcc_nbytes=_CACHE_BYTES)
    except BlockingIOError:
        raise VolumenError(
            where, "is being written by another program", remedy="close it there, or copy the file"
        ) from None
    except Exception as error:
        raise file_fault(error, where, "cannot be read as HDF5", remedy="copy it again") from error


def _candidates(file: Any) -> dict[str, tuple[int, ...]]:
    """Return the datasets that may be volumes, and their shapes."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str, item: Any) -> None:
        shape, dtype = getattr(item, "shape", None), getattr(item, "dtype", None)
        if shape is None or dtype is None or dtype.kind not in "biuf":
            return
        # Tables, such as the resolutions of BigDataViewer, are no volumes.
        if len(shape) >= 2 and sum(size > 3 for size in shape) >= 2:
            found[name] = tuple(shape)

    file.visititems(note)
    return found


def _choose(path: Path, candidates: dict[str, tuple[int, ...]], level: int, labels: bool) -> str:
    pyramid = [match for match in map(_BIG_DATA_VIEWER.fullmatch, candidates) if match]
    alike = len({(match[1], match[2]) for match in pyramid}) == 1
    if alike and len(pyramid) == len(candidates):
        levels = {int(match[3]): match[0] for match in pyramid}
        if level in levels:
            return levels[level]
        raise SingleLevelError(
            path,
            expected=f"a level from 0 to {max(levels)}",
            found=level,
            remedy="set dataset_config.ome_zarr_resolution to 0",
        )
    if len(candidates) == 1:
        return next(iter(candidates))
    if not candidates:
        raise VolumenError(path, expected="a dataset of numbers with 2 axes or more", found="none in it")
    usual = [name for name in (LABEL_NAMES if labels else IMAGE_NAMES) if name in candidates]
    if len(usual) == 1:
        return usual[0]
    raise VolumenError(
        path,
        expected="one volume",
        found=_listed(path, candidates),
        remedy=f"name one as {path.name}:/{next(iter(candidates))}, or keep one volume per file",
    )


def _listed(path: Path, candidates: dict[str, tuple[int, ...]]) -> str:
    return listed(candidates) if candidates else f"none in {path.name}"


def _axes_of(dataset: Any) -> str | None:
    """Return a letter per axis as the file states them: ilastik's `axistags`, `axes`, or HDF5's dimension labels."""
    attributes = dataset.attrs
    letters: Sequence[str] | None = None
    if "axistags" in attributes:
        try:
            letters = [entry["key"] for entry in json.loads(_text(attributes["axistags"]))["axes"]]
        except (ValueError, KeyError, TypeError):
            letters = None
    elif "axes" in attributes:
        stated = attributes["axes"]
        letters = (
            list(_text(stated)) if np.ndim(stated) == 0 else [_text(entry) for entry in np.asarray(stated)]
        )
    elif any(dimension.label for dimension in dataset.dims):
        letters = [dimension.label or UNKNOWN for dimension in dataset.dims]
    if letters is None or len(letters) != len(dataset.shape):
        return None
    known = "".join(letter.lower()[:1] if letter.lower()[:1] in "tczyx" else UNKNOWN for letter in letters)
    return known if known.strip(UNKNOWN) else None


def _geometry(path: Path, dataset: Any, axis_map: AxisMap) -> Geometry:
    """Return the voxel size that a dataset states.

    Fiji's `element_size_um` is in the order (Z, Y, X), and so are CREMI's `resolution` and `offset`, in nm. Other files
    with these attributes state a unit by `units`, or none. A `resolution` with `units` takes precedence, since it may
    have an `offset`.
    """
    attributes = dataset.attrs
    if "element_size_um" in attributes and not {"resolution", "units"} <= set(attributes):
        return stated_geometry(_of_space(attributes["element_size_um"], axis_map), "micrometer")
    for key in ("resolution", "voxel_size"):
        if key in attributes:
            of_cremi = "nanometer" if dataset.name.startswith(_CREMI) else None
            unit = unit_name(_text(attributes["units"])) if "units" in attributes else of_cremi
            sizes = _of_space(attributes[key], axis_map)
            origin = _of_space(attributes["offset"], axis_map) if "offset" in attributes else None
            return stated_geometry(sizes, unit, origin=origin)
    return Geometry()


def _of_space(values: Any, axis_map: AxisMap) -> list[float] | None:
    """Return the entries of the spatial axes: of a value per stored axis, or per spatial axis."""
    sizes = np.atleast_1d(np.asarray(values, dtype=float)).tolist()
    ndim = len(axis_map.spatial)
    if len(sizes) == len(axis_map.stored_shape):
        return list(axis_map.of_space(sizes))
    return sizes[-ndim:] if len(sizes) in (ndim, 3) and ndim <= len(sizes) else None


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.ravel()[0]
    return value.decode() if isinstance(value, bytes) else str(value)
