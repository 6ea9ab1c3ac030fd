"""Reads NRRD files, attached or detached: the header by pynrrd, the voxels by region where they are stored raw."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import files_fingerprint
from volumen.data.formats.axes import AxisMap
from volumen.data.formats.extra.library import library
from volumen.data.formats.raw_file import read_raw, too_short
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.data.space.geometry import PATIENT, Geometry, at_right_angles, stated_geometry
from volumen.data.space.units import factor, unit_name
from volumen.utils.errors import VolumenError, file_fault

_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(
        (
            "longlong",
            "long long",
            "long long int",
            "signed long long",
            "signed long long int",
            "int64",
            "int64_t",
        ),
        "i8",
    ),
    **dict.fromkeys(
        ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"
    ),
    "float": "f4",
    "double": "f8",
}
"""Names of types in the NRRD format (http://teem.sourceforge.net/nrrd/format.html)."""

_TO_RAS = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
"""Signs that bring the axes of a space to right, anterior, superior."""
_MOST_UNNAMED = 4
"""An axis without a kind of up to this many entries may hold channels, as in other formats."""
_COLOURS = ("vector", "color", "list", "point", "normal", "matrix", "complex", "quaternion")


class NrrdVolume(LazyVolume):
    """An NRRD file: stored as (X, Y, Z), with channels first or last, read as (channels, Z, Y, X).

    Raw voxels are read by region. Compressed or textual ones are decoded whole, and cached if they fit into half of
    the block cache.

    Args:
        path: the header's file.
        data: the file with the voxels.
        header: pynrrd's header.
        axis_map: meaning of the stored axes.
        dtype: type of the voxels, byte order included.
        offset: byte at which raw voxels begin; None: they are not raw.
    """

    def __init__(
        self, path: Path, data: Path, header: Any, axis_map: AxisMap, dtype: np.dtype, offset: int | None
    ) -> None:
        self._data, self._stored_dtype, self._offset = str(data), dtype, offset
        geometry, affine = _geometry(path, header, axis_map)
        status = data.stat()
        self._stamp = (str(data), status.st_size, status.st_mtime_ns)
        super().__init__(
            str(path),
            axis_map,
            dtype,
            geometry=geometry,
            chunks=None if offset is None else (1,) * (len(axis_map.shape) - 2) + axis_map.shape[-2:],
            affine=affine,
        )

    def _open(self) -> Any:
        return Path(self._data).open("rb")

    def _read_stored(self, region: Region) -> np.ndarray:
        if self._offset is not None:
            file: BinaryIO = self.handle
            return read_raw(file, self._offset, self.axis_map.stored_shape, self._stored_dtype, region, "F")
        if prod(self.axis_map.stored_shape) * self._stored_dtype.itemsize <= BLOCKS.largest:
            with self._lock:
                return np.array(BLOCKS.get(self._stamp, self._decode)[region])
        return np.array(self._decode()[region])

    def _decode(self) -> np.ndarray:
        nrrd = library("nrrd", self.path)
        try:
            values, _ = nrrd.read(self.path, index_order="F")
        except Exception as error:
            raise file_fault(error, self.path, "is truncated or corrupt", remedy="copy it again") from error
        if values.shape != self.axis_map.stored_shape:
            raise VolumenError(
                self.path,
                expected=f"voxels of shape {self.axis_map.stored_shape}",
                found=str(values.shape),
                remedy="copy it again",
            )
        return values

    def fingerprint(self) -> str:
        """Return a hash of sizes, modification times and first bytes of the header's file and of the voxels'."""
        return files_fingerprint((self.path, self._data), self.shape, self.channels, self.dtype)


def open_nrrd(path: Path, *, ndim: int | None = None) -> NrrdVolume:
    """Open an NRRD file.

    Args:
        path: `.nrrd`, or `.nhdr` with the voxels in another file.
        ndim: 2 reads a volume of one slice as a 2D image.

    Raises:
        VolumenError: the header is damaged, the voxels are missing or too few, or of a type that is no number.
    """
    header, end = _header(path)
    shape = tuple(int(size) for size in header["sizes"])
    dtype = _dtype(path, header)
    axis_map = _axis_map(path, header, shape, ndim)
    data, offset = _data_file(path, header, end)
    volume = NrrdVolume(path, data, header, axis_map, dtype, offset)
    if offset is not None:
        needed, found = offset + prod(shape) * dtype.itemsize, data.stat().st_size
        if found < needed:
            raise too_short(data, needed, found)
    return volume


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header, and the byte after it."""
    nrrd = library("nrrd", path)
    try:
        with path.open("rb") as file:
            header = dict(nrrd.read_header(file))
            end = file.tell()
    except Exception as error:
        raise file_fault(error, path, "its NRRD header cannot be read", remedy="copy it again") from error
    missing = [key for key in ("type", "sizes", "encoding") if key not in header]
    if missing or min(header["sizes"], default=0) < 1:
        raise VolumenError(
            path,
            "its NRRD header is damaged",
            found=f"no {', '.join(missing) or 'voxels'}",
            remedy="copy it again",
        )
    return header, end


def _dtype(path: Path, header: dict[str, Any]) -> np.dtype:
    name = _TYPES.get(str(header["type"]).lower())
    if name is None:
        raise VolumenError(path, expected="numbers", found=f"type {header['type']!r}", remedy="convert it")
    big = str(header.get("endian", "little")).lower() == "big"
    return np.dtype(name).newbyteorder(">" if big else "<")


def _data_file(path: Path, header: dict[str, Any], end: int) -> tuple[Path, int | None]:
    """Return the file with the voxels, and the byte at which they begin if they are raw."""
    named = header.get("data file", header.get("datafile"))
    skips = (
        int(header.get("line skip", header.get("lineskip", 0))),
        int(header.get("byte skip", header.get("byteskip", 0))),
    )
    if isinstance(named, list) or (named and (" " in str(named).strip() and "%" in str(named))):
        raise VolumenError(
            path, expected="voxels in one file", found="a list of files", remedy="save it as one .nrrd"
        )
    data = path if named is None else path.parent / str(named)
    if not data.is_file():
        raise VolumenError(
            data, f"is missing; {path.name} says that it holds the voxels", remedy="copy it too"
        )
    raw = str(header["encoding"]).lower() == "raw" and not any(skips)
    return data, (0 if named is not None else end) if raw else None


def _axis_map(path: Path, header: dict[str, Any], shape: tuple[int, ...], ndim: int | None) -> AxisMap:
    channels = _channel_axes(path, header, shape)
    spatial = [axis for axis in range(len(shape)) if axis not in channels]
    spare = [axis for axis in channels if shape[axis] != 1]
    if len(spatial) > 3:
        # Without kinds, trailing axes of one entry carry nothing.
        spatial = [axis for axis in spatial if shape[axis] != 1 or axis < 3]
    if not 2 <= len(spatial) <= 3 or len(spare) > 1:
        raise VolumenError(
            path,
            expected="2 or 3 spatial axes and channels",
            found=f"sizes {shape}",
            remedy="split it into files",
        )
    if len(spatial) == 3 and shape[spatial[2]] == 1 and ndim == 2:
        spatial = spatial[:2]
    if ndim is not None and len(spatial) != ndim:
        raise VolumenError(path, expected=f"{ndim} spatial axes", found=f"sizes {shape}")
    return AxisMap(shape, tuple(reversed(spatial)), spare[0] if spare else None)


def _channel_axes(path: Path, header: dict[str, Any], shape: tuple[int, ...]) -> list[int]:
    """Return the axes that are not of space: without a direction, or of a kind that is none of space.

    Raises:
        VolumenError: neither directions nor kinds say which of four axes holds the channels.
    """
    directions = header.get("space directions")
    if directions is not None:
        rows = [None if row is None else np.asarray(row, dtype=float) for row in directions]
        return [axis for axis, row in enumerate(rows) if row is None or not np.isfinite(row).all()]
    kinds = [str(kind).lower() for kind in header.get("kinds", [])]
    found = [
        axis
        for axis, kind in enumerate(kinds)
        if any(word in kind for word in _COLOURS) and axis < len(shape)
    ]
    if found or len(shape) != 4:
        return found
    small = [axis for axis in (0, 3) if shape[axis] <= _MOST_UNNAMED]
    if len(small) != 1:
        raise VolumenError(
            path,
            expected="`kinds` that say which axis holds channels",
            found=f"sizes {shape}",
            remedy="write them, or split it into files",
        )
    return small


def _geometry(where: Path, header: dict[str, Any], axis_map: AxisMap) -> tuple[Geometry, np.ndarray | None]:
    """Return voxel size and place, and the (4, 4) affine over (X, Y, Z) in right-anterior-superior space, if stated."""
    ndim = len(axis_map.spatial)
    directions = header.get("space directions")
    if directions is None:
        sizes = header.get("spacings")
        if sizes is None:
            return Geometry(), None
        units = header.get("units")
        named = [unit_name(str(unit)) for unit in axis_map.of_space(units)] if units is not None else None
        return stated_geometry([float(size) for size in axis_map.of_space(sizes)], named), None
    names = {unit_name(str(unit)) for unit in header.get("space units") or [""]}
    unit = names.pop() if len(names) == 1 else None
    if names:
        return Geometry(problem="a space whose axes have different units"), None
    # Column a: the step along array axis a, components in the order of the space, (x, y, z).
    steps = np.array([np.asarray(directions[axis], dtype=float) for axis in axis_map.spatial]).T
    lengths = np.linalg.norm(steps, axis=0)
    signs = _TO_RAS.get(str(header.get("space", "")).lower())
    usable = np.isfinite(lengths).all() and lengths.all() and len(steps) == ndim
    if usable and not at_right_angles(steps):
        raise VolumenError(
            where,
            expected="space directions at right angles",
            found=" ".join(f"({', '.join(f'{value:g}' for value in step)})" for step in steps.T),
            remedy="resample it to a rectangular grid",
        )
    if unit is not None and factor(unit, "millimeter") is None:
        return Geometry(problem=f"a space whose unit is {unit!r}"), None
    if usable and "space" not in header and "space origin" in header:
        # A space without a name: its axes are those of the array.
        place = np.asarray(header["space origin"], dtype=float)[::-1]
        geometry = stated_geometry(
            lengths.tolist(), unit, origin=place.tolist(), directions=(steps / lengths)[::-1]
        )
        return geometry, None
    if not usable or signs is None:
        return stated_geometry(lengths.tolist(), unit), None
    steps = steps * np.asarray(signs, dtype=float)[:ndim, None]
    origin = np.asarray(header.get("space origin", np.zeros(ndim)), dtype=float) * np.asarray(signs)[:ndim]
    geometry = stated_geometry(
        lengths.tolist(),
        unit or "millimeter",
        origin=tuple(origin[::-1]),
        directions=(steps / lengths)[::-1],
        frame=PATIENT,
    )
    if ndim != 3:
        return geometry, None
    affine = np.eye(4)
    affine[:3, :3] = steps[:, ::-1]
    affine[:3, 3] = origin
    return geometry, affine
