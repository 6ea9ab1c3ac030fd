"""Reads MetaImage files (ITK's .mha, and .mhd with the voxels in another file): raw voxels by region.

Source: https://itk.org/Wiki/ITK/MetaIO/Documentation
"""

from __future__ import annotations

import zlib
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import files_fingerprint
from volumen.data.formats.axes import AxisMap
from volumen.data.formats.raw_file import read_raw, too_short
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.data.space.geometry import PATIENT, Geometry, at_right_angles, stated_geometry
from volumen.utils.errors import VolumenError, file_fault

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_LONGEST_HEADER = 64 * 1024
_LAST_KEY = "ElementDataFile"
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


class MetaImageVolume(LazyVolume):
    """A MetaImage: stored as (channels, X, Y, Z), the first fastest; read as (channels, Z, Y, X).

    Raw voxels are read by region. Compressed ones are decoded whole, and cached if they fit into half of the block
    cache.

    Args:
        path: the header's file.
        data: the file with the voxels.
        axis_map: meaning of the stored axes, (Z, Y, X[, C]).
        dtype: type of the voxels, byte order included.
        offset: byte at which the voxels begin.
        compressed: whether they are compressed by zlib.
        placed: voxel size and place, and the affine.
    """

    def __init__(
        self,
        path: Path,
        data: Path,
        axis_map: AxisMap,
        dtype: np.dtype,
        offset: int,
        compressed: bool,
        placed: tuple[Geometry, np.ndarray | None],
    ) -> None:
        self._data, self._stored_dtype, self._offset, self._compressed = str(data), dtype, offset, compressed
        status = data.stat()
        self._stamp = (str(data), status.st_size, status.st_mtime_ns)
        chunks = None if compressed else (1,) * (len(axis_map.shape) - 2) + axis_map.shape[-2:]
        super().__init__(str(path), axis_map, dtype, geometry=placed[0], chunks=chunks, affine=placed[1])

    def _open(self) -> Any:
        return Path(self._data).open("rb")

    def _read_stored(self, region: Region) -> np.ndarray:
        shape = self.axis_map.stored_shape
        if not self._compressed:
            file: BinaryIO = self.handle
            return read_raw(file, self._offset, shape, self._stored_dtype, region)
        if prod(shape) * self._stored_dtype.itemsize <= BLOCKS.largest:
            with self._lock:
                return np.array(BLOCKS.get(self._stamp, self._decode)[region])
        return np.array(self._decode()[region])

    def _decode(self) -> np.ndarray:
        shape = self.axis_map.stored_shape
        try:
            packed = Path(self._data).read_bytes()[self._offset :]
            data = zlib.decompress(packed)
        except Exception as error:
            raise file_fault(error, self._data, "is truncated or corrupt", remedy="copy it again") from error
        needed = prod(shape) * self._stored_dtype.itemsize
        if len(data) < needed:
            raise too_short(self._data, needed, len(data))
        return np.frombuffer(data, self._stored_dtype, prod(shape)).reshape(shape)

    def fingerprint(self) -> str:
        """Return a hash of sizes, modification times and first bytes of the header's file and of the voxels'."""
        return files_fingerprint((self.path, self._data), self.shape, self.channels, self.dtype)


def open_meta_image(path: Path, *, ndim: int | None = None) -> MetaImageVolume:
    """Open a MetaImage.

    Args:
        path: `.mha`, or `.mhd` with the voxels in another file.
        ndim: 2 reads a volume of one slice as a 2D image.

    Raises:
        VolumenError: the header is damaged, the voxels are missing or too few, or their axes are not at right angles.
    """
    header, end = _header(path)
    try:
        sizes = [int(value) for value in header["DimSize"].split()]
        channels = int(header.get("ElementNumberOfChannels", 1))
        name = header["ElementType"].removesuffix("_ARRAY")
    except (KeyError, ValueError) as error:
        raise VolumenError(path, "its MetaImage header is damaged", found=str(error)) from None
    if name not in _TYPES or not 2 <= len(sizes) <= 3 or min(sizes) < 1:
        raise VolumenError(
            path,
            expected="numbers on 2 or 3 axes",
            found=f"{name} of size {' x '.join(map(str, sizes))}",
            remedy="convert it",
        )
    big = _is_true(header, "BinaryDataByteOrderMSB") or _is_true(header, "ElementByteOrderMSB")
    dtype = np.dtype(_TYPES[name]).newbyteorder(">" if big else "<")
    if not _is_true(header, "BinaryData", True):
        raise VolumenError(path, expected="binary voxels", found="text", remedy="convert it")
    axis_map = _axis_map(path, sizes, channels, ndim)
    data, offset = _data_file(path, header, end)
    compressed = _is_true(header, "CompressedData")
    needed = prod(axis_map.stored_shape) * dtype.itemsize
    found = data.stat().st_size
    if header.get("HeaderSize") == "-1":
        offset = found - needed
    elif "HeaderSize" in header:
        offset += int(header["HeaderSize"])
    if not compressed and (found < offset + needed or offset < 0):
        raise too_short(data, max(offset, 0) + needed, found)
    placed = _placed(path, header, axis_map)
    return MetaImageVolume(path, data, axis_map, dtype, offset, compressed, placed)


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Return the entries of the header, and the byte after it."""
    with path.open("rb") as stream:
        content = stream.read(_LONGEST_HEADER)
    header: dict[str, str] = {}
    end = 0
    while (stop := content.find(b"\n", end)) >= 0 or end < len(content):
        stop = stop if stop >= 0 else len(content)
        key, mark, value = content[end:stop].partition(b"=")
        end = stop + 1
        if not mark or not key.strip().isalnum():
            break
        header[key.strip().decode()] = value.strip().decode("utf-8", "replace")
        if key.strip().decode() == _LAST_KEY:
            return header, end
    raise VolumenError(
        path,
        "its MetaImage header is damaged",
        expected=f"a line {_LAST_KEY}",
        found="none",
        remedy="copy it again",
    )


def _is_true(header: dict[str, str], key: str, default: bool = False) -> bool:
    return header.get(key, str(default)).lower() == "true"


def _axis_map(path: Path, sizes: list[int], channels: int, ndim: int | None) -> AxisMap:
    lead = (channels,) if channels > 1 else ()
    shape = (*sizes[::-1], *lead)
    spatial = tuple(range(len(sizes)))
    if len(sizes) == 3 and sizes[2] == 1 and ndim == 2:
        spatial = spatial[1:]
    if ndim is not None and len(spatial) != ndim:
        raise VolumenError(path, expected=f"{ndim} spatial axes", found=f"size {sizes}")
    return AxisMap(shape, spatial, len(sizes) if lead else None)


def _data_file(path: Path, header: dict[str, str], end: int) -> tuple[Path, int]:
    """Return the file with the voxels, and the byte at which they begin."""
    named = header[_LAST_KEY]
    if named.upper() == "LOCAL":
        return path, end
    if named.upper().startswith("LIST") or "%" in named:
        raise VolumenError(
            path, expected="voxels in one file", found="a list of files", remedy="save it as one .mha"
        )
    data = path.parent / named
    if not data.is_file():
        raise VolumenError(
            data, f"is missing; {path.name} says that it holds the voxels", remedy="copy it too"
        )
    return data, 0


def _placed(path: Path, header: dict[str, str], axis_map: AxisMap) -> tuple[Geometry, np.ndarray | None]:
    """Return voxel size and place in right-anterior-superior space, and the affine over (X, Y, Z).

    `TransformMatrix` lists the directions of the axes one after the other, in left-posterior-superior space, in which
    ITK stores positions; sizes are in millimeters.
    """
    count = len(axis_map.stored_shape) - (axis_map.channel is not None)
    sizes = _numbers(path, header, ("ElementSpacing", "ElementSize"), count)
    if sizes is None:
        return Geometry(), None
    ndim = len(axis_map.shape)
    origin = _numbers(path, header, ("Offset", "Position", "Origin"), count)
    matrix = _numbers(path, header, ("TransformMatrix", "Rotation", "Orientation"), count * count)
    if ndim != 3 or origin is None:
        return stated_geometry(sizes[:ndim][::-1], "millimeter"), None
    columns = np.eye(3) if matrix is None else np.array(matrix).reshape(3, 3).T
    if not columns.any(axis=0).all() or not at_right_angles(columns):
        raise VolumenError(
            path,
            expected="axes at right angles",
            found=f"TransformMatrix {' '.join(f'{value:g}' for value in matrix or ())}",
            remedy="resample it to a rectangular grid",
        )
    steps = _LPS_TO_RAS[:, None] * columns
    place = _LPS_TO_RAS * np.array(origin)
    geometry = stated_geometry(
        sizes[::-1], "millimeter", origin=place[::-1].tolist(), directions=steps[::-1, ::-1], frame=PATIENT
    )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps * np.array(sizes), place
    return geometry, affine


def _numbers(path: Path, header: dict[str, str], keys: tuple[str, ...], count: int) -> list[float] | None:
    key = next((key for key in keys if key in header), None)
    if key is None:
        return None
    try:
        values = [float(value) for value in header[key].split()]
    except ValueError:
        values = []
    if len(values) != count:
        raise VolumenError(
            path, expected=f"{count} numbers of {key}", found=repr(header[key]), remedy="write it again"
        )
    return values
