"""Reads MRC files (MRC2014, CCP4 maps, IMOD's stacks): the header by mrcfile, the voxels by region."""

from __future__ import annotations

import warnings
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from volumen.data.caching.fingerprints import file_fingerprint
from volumen.data.formats.axes import AxisMap
from volumen.data.formats.extra.library import library
from volumen.data.formats.raw_file import read_raw, too_short
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.utils.errors import VolumenError, file_fault

_HEADER_BYTES = 1024
_IMOD_STAMP, _SIGNED_BYTES = 1146047817, 1
_VOLUME_STACK = 401
_TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


class MrcVolume(LazyVolume):
    """An MRC file, stored uncompressed; of it only the region is read.

    Args:
        path: the file.
        header: mrcfile's header.
        axis_map: order of its sections, rows and columns.
        dtype: type of its voxels, byte order included.
    """

    def __init__(self, path: Path, header: Any, axis_map: AxisMap, dtype: np.dtype) -> None:
        self._stored_dtype = dtype
        self._offset = _HEADER_BYTES + int(header.nsymbt)
        super().__init__(
            str(path),
            axis_map,
            dtype,
            geometry=_geometry(header, axis_map),
            chunks=(1,) * (len(axis_map.shape) - 2) + axis_map.shape[-2:],
        )

    def _open(self) -> Any:
        return Path(self.path).open("rb")

    def _read_stored(self, region: Region) -> np.ndarray:
        file: BinaryIO = self.handle
        return read_raw(file, self._offset, self.axis_map.stored_shape, self._stored_dtype, region)

    def fingerprint(self) -> str:
        """Return a hash of the file's size, modification time and first bytes."""
        return file_fingerprint(Path(self.path), self.shape, self.channels, self.dtype)


def open_mrc(path: Path, *, ndim: int | None = None) -> MrcVolume:
    """Open an MRC file.

    Args:
        path: the file, not compressed.
        ndim: 2 reads a file of one section as a 2D image; None does so too.

    Raises:
        VolumenError: the header is damaged, the file is too short, or its voxels are complex or packed.
    """
    header = _header(path)
    shape = (int(header.nz), int(header.ny), int(header.nx))
    if min(shape) < 1:
        raise VolumenError(path, "its MRC header is damaged", found=f"shape {shape}", remedy="copy it again")
    if int(header.ispg) >= _VOLUME_STACK:
        raise VolumenError(
            path, expected="one volume", found="a stack of volumes", remedy="save one file per volume"
        )
    dtype = _dtype(path, header)
    volume = MrcVolume(path, header, _axis_map(path, header, shape, ndim), dtype)
    needed, found = volume._offset + prod(shape) * dtype.itemsize, path.stat().st_size
    if found < needed:
        raise too_short(path, needed, found)
    return volume


def _header(path: Path) -> Any:
    mrcfile = library("mrcfile", path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # permissive: what is wrong but harmless, such as an unknown stamp
            with mrcfile.open(path, permissive=True, header_only=True) as file:
                return file.header.copy()
    except Exception as error:
        raise file_fault(error, path, "its MRC header cannot be read", remedy="copy it again") from error


def _dtype(path: Path, header: Any) -> np.dtype:
    """Return the type of the voxels.

    Mode 0 is signed by the standard of 2014; files of IMOD hold unsigned bytes unless a flag says signed
    (https://bio3d.colorado.edu/imod/doc/mrc_format.txt).
    """
    mode = int(header.mode)
    if mode not in _TYPES:
        raise VolumenError(
            path,
            expected="voxels of mode 0, 1, 2, 6 or 12",
            found=f"mode {mode}" + (" (complex)" if mode in (3, 4) else ""),
            remedy="convert it (newstack -mode 2)",
        )
    name = _TYPES[mode]
    if mode == 0 and _imod_word(header, 152) == _IMOD_STAMP and not _imod_word(header, 156) & _SIGNED_BYTES:
        name = "u1"
    return np.dtype(name).newbyteorder(header.mode.dtype.byteorder)


def _imod_word(header: Any, byte: int) -> int:
    order = header.mode.dtype.byteorder
    return int(np.frombuffer(header.tobytes(), np.dtype("i4").newbyteorder(order), 1, byte)[0])


def _axis_map(path: Path, header: Any, shape: tuple[int, int, int], ndim: int | None) -> AxisMap:
    # Axis 1 is x, 2 is y, 3 is z; unset numbers mean columns, rows, sections.
    numbers = [int(header.maps), int(header.mapr), int(header.mapc)]
    if sorted(numbers) != [1, 2, 3]:
        numbers = [3, 2, 1]
    spatial = tuple(numbers.index(axis) for axis in (3, 2, 1))
    if shape[spatial[0]] == 1 and ndim in (None, 2):
        spatial = spatial[1:]
    if ndim is not None and len(spatial) != ndim:
        raise VolumenError(path, expected=f"{ndim} spatial axes", found=f"shape {shape}")
    return AxisMap(shape, spatial)


def _geometry(header: Any, axis_map: AxisMap) -> Geometry:
    """Return voxel size and origin: the cell divided by its intervals, in Å; a cell of 0 states nothing."""
    cell = [float(header.cella[axis]) for axis in "zyx"]
    intervals = [int(header[f"m{axis}"]) for axis in "zyx"]
    ndim = len(axis_map.shape)
    if not all(cell[-ndim:]) or not all(intervals[-ndim:]):
        return Geometry()
    sizes = [length / count for length, count in zip(cell, intervals, strict=True)][-ndim:]
    origin = [float(header.origin[axis]) for axis in "zyx"][-ndim:]
    return stated_geometry(sizes, "angstrom", origin=origin)
