"""Reads NIfTI files: the header by nibabel, the voxels by region, with axes transposed to (Z, Y, X)."""

from __future__ import annotations

import gzip
import logging
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import file_fingerprint
from volumen.data.formats.axes import AxisMap
from volumen.data.formats.raw_file import read_raw, too_short
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.data.space.geometry import (
    PATIENT,
    Geometry,
    at_right_angles,
    nearest_turn,
    stated_geometry,
)
from volumen.data.space.units import unit_name
from volumen.utils.errors import VolumenError, file_fault

logger = logging.getLogger(__name__)


class NiftiVolume(LazyVolume):
    """A NIfTI image: stored as (X, Y, Z[, channels]), read as (channels, Z, Y, X).

    Of a plain `.nii` only the region is read. A `.nii.gz` has no random access: a volume of up to half the size of the
    block cache is decompressed once and cached; for a larger one every read decompresses the file from its start to
    the region's last slice, which takes seconds per patch.

    If the header has a scale factor, values are scaled and returned as float32.
    """

    def __init__(self, path: Path, image: Any, axis_map: AxisMap) -> None:
        proxy = image.dataobj
        self.compressed = path.name.lower().endswith(".gz")
        self._stored_dtype = np.dtype(proxy.dtype)
        self._offset = int(proxy.offset)
        self._scaling = (float(proxy.slope), float(proxy.inter))
        status = path.stat()
        self._stamp = (str(path), status.st_size, status.st_mtime_ns)
        super().__init__(
            str(path),
            axis_map,
            self._stored_dtype if self._scaling == (1, 0) else np.dtype(np.float32),
            geometry=_geometry(path, image, axis_map),
            chunks=None if self.compressed else (1,) * (len(axis_map.shape) - 2) + axis_map.shape[-2:],
            affine=np.asarray(image.affine, dtype=float),
        )

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all voxels in memory, in the stored type."""
        return prod(self.axis_map.stored_shape) * self._stored_dtype.itemsize

    def _open(self) -> Any:
        path = Path(self.path)
        return _load(path).dataobj if self.compressed else path.open("rb")

    def _read_stored(self, region: Region) -> np.ndarray:
        return self._scale(self._read_compressed(region) if self.compressed else self._read_plain(region))

    def _read_plain(self, region: Region) -> np.ndarray:
        file: BinaryIO = self.handle
        return read_raw(file, self._offset, self.axis_map.stored_shape, self._stored_dtype, region, "F")

    def _read_compressed(self, region: Region) -> np.ndarray:
        try:
            if self.decoded_bytes <= BLOCKS.largest:
                with self._lock:
                    return np.array(BLOCKS.get(self._stamp, self._decode)[region])
            with self._lock:
                return self._slice(region)
        except VolumenError:
            raise
        except Exception as error:
            raise file_fault(error, self.path, "is truncated or corrupt", remedy="copy it again") from error

    def _decode(self) -> np.ndarray:
        return np.array(self.handle.get_unscaled(), order="K")

    def _slice(self, region: Region) -> np.ndarray:
        from nibabel.fileslice import fileslice

        with gzip.open(self.path) as file:
            return fileslice(
                file, region, self.axis_map.stored_shape, self._stored_dtype, self._offset, order="F"
            )

    def _scale(self, stored: np.ndarray) -> np.ndarray:
        slope, inter = self._scaling
        if (slope, inter) == (1, 0):
            return stored
        return (stored * slope + inter).astype(np.float32)

    def fingerprint(self) -> str:
        """Return a hash of the file's size, modification time and first bytes."""
        return file_fingerprint(Path(self.path), self.shape, self.channels, self.dtype)


def open_nifti(path: Path, *, ndim: int | None = None) -> NiftiVolume:
    """Open a NIfTI file.

    Args:
        path: `.nii` or `.nii.gz`.
        ndim: 2 reads a volume of one slice as a 2D image.

    Raises:
        VolumenError: the header is damaged, the file is too short, or it has other axes than space and channels.
    """
    image = _load(path)
    shape = tuple(int(size) for size in image.shape)
    if min(shape, default=0) < 1:
        raise VolumenError(
            path, "its NIfTI header is damaged", found=f"shape {shape}", remedy="copy it again"
        )
    if np.dtype(image.dataobj.dtype).kind not in "biuf":
        raise VolumenError(
            path, expected="numbers", found=f"values of type {image.dataobj.dtype}", remedy="convert it"
        )
    volume = NiftiVolume(path, image, _axis_map(path, shape, ndim))
    needed, found = volume._offset + volume.decoded_bytes, path.stat().st_size
    if not volume.compressed and found < needed:
        raise too_short(path, needed, found)
    return volume


def _axis_map(path: Path, shape: tuple[int, ...], ndim: int | None) -> AxisMap:
    spatial = min(len(shape), 3)
    extra = [axis for axis in range(spatial, len(shape)) if shape[axis] != 1]
    if spatial < 2 or len(extra) > 1:
        raise VolumenError(
            path, expected="(X, Y[, Z][, channels])", found=f"shape {shape}", remedy="split it into files"
        )
    if ndim == 2 and spatial == 3 and shape[2] == 1:
        spatial = 2
    if ndim is not None and spatial != ndim:
        raise VolumenError(path, expected=f"{ndim} spatial axes", found=f"shape {shape}")
    return AxisMap(shape, tuple(reversed(range(spatial))), extra[0] if extra else None)


class _SizeRepairs(logging.Filter):
    """Drops nibabel's messages about voxel sizes that it repairs: `_stated_sizes` reads the stored ones instead."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("pixdim[")


_REPAIRS = _SizeRepairs()


def _load(path: Path) -> Any:
    import nibabel

    nibabel.imageglobals.logger.addFilter(_REPAIRS)
    try:
        return nibabel.load(path)
    except Exception as error:
        raise file_fault(error, path, "its NIfTI header cannot be read", remedy="copy it again") from error


def _unit(path: Path, header: Any) -> str | None:
    try:
        return unit_name(header.get_xyzt_units()[0])
    except KeyError as error:
        logger.warning(
            "%s: its header gives unit number %d, which NIfTI does not define", path, error.args[0]
        )
        return None


def _geometry(path: Path, image: Any, axis_map: AxisMap) -> Geometry:
    """Return the geometry from the affine, or only the voxel size if the header has no affine.

    The voxel size is the length of the affine's columns. The header also contains it; if the two differ, a warning is
    logged, since programs differ in which of the two they use.
    """
    header = image.header
    ndim = len(axis_map.spatial)
    unit = _unit(path, header)
    header_sizes = axis_map.of_space(_stated_sizes(path, image))
    codes = int(header["sform_code"]), int(header["qform_code"])
    # The sizes of a qform come from the header, in which nibabel has already repaired them.
    if not codes[0] and (not codes[1] or not all(size > 0 for size in header_sizes)):
        return stated_geometry(header_sizes, unit)
    geometry = _of_affine(image.affine, unit, ndim)
    if geometry.spacing and not np.allclose(geometry.spacing, header_sizes, rtol=1e-2, atol=0):
        logger.warning(
            "%s: its affine states voxels of %s, its header (pixdim) %s; the affine counts",
            path,
            geometry.text(),
            " x ".join(f"{size:g}" for size in header_sizes),
        )
    if geometry.directions is not None and not at_right_angles(np.array(geometry.directions)):
        logger.warning(
            "%s: its axes are not at right angles; distances and turns are computed as if they were", path
        )
    if all(codes) and geometry.is_placed:
        other = _of_affine(header.get_qform(), unit, ndim)
        if other.is_placed and not nearest_turn(geometry, other)[0].is_identity:
            logger.warning(
                "%s: its sform runs to %s, its qform to %s; the sform counts",
                path,
                geometry.orientation,
                other.orientation,
            )
    return geometry


def _stated_sizes(path: Path, image: Any) -> list[float]:
    """Return the voxel sizes as stored in the header; nibabel changes 0 to 1 and drops signs."""
    from nibabel.openers import ImageOpener

    with ImageOpener(str(path)) as file:
        stored = type(image.header).from_fileobj(file, check=False)
    return [float(size) for size in stored["pixdim"][1:8]]


def _of_affine(affine: Any, unit: str | None, ndim: int) -> Geometry:
    """Convert a (4, 4) affine over (X, Y, Z) to the geometry of the array (Z, Y, X)."""
    full = np.asarray(affine, dtype=float)
    lengths = np.linalg.norm(full[:3, :ndim], axis=0)
    if not np.isfinite(full).all() or not lengths.all():
        return stated_geometry(tuple(lengths[::-1]), unit)
    directions = full[:3, :ndim] / lengths
    if ndim == 2 and np.abs(directions[2]).max() > 1e-3:
        return stated_geometry(tuple(lengths[::-1]), unit)  # an oblique slice
    return stated_geometry(
        tuple(lengths[::-1]),
        unit,
        origin=tuple(full[:ndim, 3][::-1]),
        directions=directions[:ndim][::-1, ::-1],
        frame=PATIENT,
    )
