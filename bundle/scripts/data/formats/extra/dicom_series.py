"""Reads a DICOM series: a folder with one file per slice, or one file with many frames."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import digest, file_fingerprint
from volumen.data.formats.axes import AxisMap
from volumen.data.formats.detection import dicom_files
from volumen.data.formats.extra.library import library
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.data.space.geometry import PATIENT, Geometry, at_right_angles, stated_geometry
from volumen.utils.errors import VolumenError, file_fault

logger = logging.getLogger(__name__)

_TAGS = [
    "SeriesInstanceUID", "SeriesDescription", "SOPClassUID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "PixelRepresentation", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_DIRECTORY = "1.2.840.10008.1.3.10"
"""Class of a DICOMDIR, which lists files and holds no image."""
_SAME_DIRECTION = 1e-3
_SAME_STEP = 0.05
"""Largest share by which the distance of two slices may differ from that of the others."""
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Slice:
    """One slice of a series.

    Args:
        file: its file.
        frame: number of its frame; None if the file has one only.
        position: centre of its first pixel in patient space (left, posterior, superior), in mm; None if not stated.
        axes: directions along a row and along a column, 6 numbers; None if not stated.
        spacing: distance of rows and of columns in mm; None if not stated.
        slope, intercept: a value is stored value * slope + intercept.
    """

    file: str
    frame: int | None
    position: tuple[float, ...] | None
    axes: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float
    intercept: float


class DicomSeries(LazyVolume):
    """A series, read as (1, Z, Y, X); each slice is decoded when a region needs it.

    The slices are in the order of their positions along the normal of the slices.

    Args:
        path: folder or file.
        slices: the slices in this order.
        shape: (rows, columns).
        dtype: type of the values after the rescaling.
        geometry, affine: place of the series.
        flat: whether a single slice is a 2D image.
    """

    def __init__(
        self,
        path: str,
        slices: Sequence[Slice],
        shape: tuple[int, int],
        dtype: np.dtype,
        geometry: Geometry,
        affine: np.ndarray | None,
        flat: bool,
    ) -> None:
        self._slices = tuple(slices)
        axis_map = AxisMap((len(slices), *shape), (1, 2) if flat else (0, 1, 2))
        super().__init__(
            path,
            axis_map,
            dtype,
            geometry=geometry,
            chunks=shape if flat else (1, *shape),
            affine=None if flat else affine,
        )

    def _open(self) -> Any:
        return library("pydicom", self.path)

    def _read_stored(self, region: Region) -> np.ndarray:
        out = np.empty([part.stop - part.start for part in region], self.dtype)
        for number, index in enumerate(range(region[0].start, region[0].stop)):
            out[number] = self._pixels(self._slices[index])[region[1:]]
        return out

    def _pixels(self, item: Slice) -> np.ndarray:
        status = Path(item.file).stat()
        key = (item.file, status.st_mtime_ns, status.st_size, item.frame)
        stored = BLOCKS.get(key, lambda: self._decode(item))
        if (item.slope, item.intercept) == (1.0, 0.0):
            return stored
        return (stored * item.slope + item.intercept).astype(self.dtype)

    def _decode(self, item: Slice) -> np.ndarray:
        pydicom = self.handle
        try:
            dataset = pydicom.dcmread(item.file)
            pixels = dataset.pixel_array
            pixels = np.array(pixels if item.frame is None else pixels[item.frame])
        except Exception as error:
            raise file_fault(
                error,
                item.file,
                "its pixels cannot be read",
                remedy="copy it again, or install the decoder of its compression: pip install 'pylibjpeg[all]'",
            ) from error
        if pixels.dtype.kind not in "iu":
            raise VolumenError(
                item.file, expected="pixels of integers", found=str(pixels.dtype), remedy="convert it"
            )
        if pixels.shape != self.axis_map.stored_shape[1:]:
            raise VolumenError(
                item.file,
                expected=f"pixels of shape {self.axis_map.stored_shape[1:]}",
                found=str(pixels.shape),
            )
        return pixels

    def fingerprint(self) -> str:
        """Return a hash of the sizes, times and first bytes of all files, in the order of the slices."""
        files = dict.fromkeys(item.file for item in self._slices)
        return digest([file_fingerprint(Path(file)) for file in files])


def open_dicom(path: Path, *, ndim: int | None = None) -> DicomSeries:
    """Open a series.

    Args:
        path: folder with the files of one series, or one file.
        ndim: 2 reads a single slice as a 2D image; None does so too.

    Raises:
        VolumenError: no image, several series, slices that differ in size or direction, a tilted gantry, missing or
            repeated slices, or pixels that are no grey values.
    """
    pydicom = library("pydicom", path)
    files = [str(file) for file in dicom_files(path)] if path.is_dir() else [str(path)]
    headers = [(file, _header(pydicom, file)) for file in files]
    headers = [(file, header) for file, header in headers if _is_image(header)]
    if not headers:
        raise VolumenError(path, expected="a series of images", found="no image", remedy="check the path")
    _refuse_several(path, [header for _, header in headers])
    first = headers[0][1]
    for file, header in headers:
        _check_pixels(file, header)
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            raise VolumenError(
                file,
                expected=f"{first.Rows} x {first.Columns} pixels, as in the other slices",
                found=f"{header.Rows} x {header.Columns}",
                remedy="move it to a folder of its own",
            )
    slices = [item for file, header in headers for item in _slices_of(file, header)]
    slices, geometry, affine = _arranged(path, slices, first)
    if len(slices) > 1 and ndim == 2:
        raise VolumenError(path, expected="2 spatial axes", found=f"{len(slices)} slices")
    flat = len(slices) == 1 and ndim in (None, 2)
    if flat and geometry.spacing is not None:
        geometry = stated_geometry(geometry.spacing[1:], geometry.unit)
    dtype = _dtype(first, slices)
    return DicomSeries(
        str(path), slices, (int(first.Rows), int(first.Columns)), dtype, geometry, affine, flat
    )


def _header(pydicom: Any, file: str) -> Any:
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    except Exception as error:
        raise file_fault(error, file, "its DICOM header cannot be read", remedy="copy it again") from error


def _is_image(header: Any) -> bool:
    return str(header.get("SOPClassUID", "")) != _DIRECTORY and "Rows" in header and "Columns" in header


def _refuse_several(path: Path, headers: Sequence[Any]) -> None:
    series: dict[str, list[Any]] = {}
    for header in headers:
        series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(header)
    if len(series) > 1:
        named = [
            f"{str(found[0].get('SeriesDescription', '')) or number!r} ({len(found)} files)"
            for number, found in series.items()
        ]
        raise VolumenError(
            path,
            expected="the files of one series",
            found=f"{len(series)} series: {', '.join(sorted(named))}",
            remedy="move each to a folder of its own",
        )


def _check_pixels(file: str, header: Any) -> None:
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise VolumenError(
            file,
            expected="grey values",
            found=str(header.get("PhotometricInterpretation")),
            remedy="convert it",
        )
    if "ModalityLUTSequence" in header:
        raise VolumenError(
            file, expected="values with slope and intercept", found="a table of values", remedy="convert it"
        )


def _slices_of(file: str, header: Any) -> list[Slice]:
    frames = int(header.get("NumberOfFrames", 1) or 1)
    if frames == 1 and "PerFrameFunctionalGroupsSequence" not in header:
        return [_slice(file, None, header, header, header, header)]
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    groups = header.get("PerFrameFunctionalGroupsSequence") or [None] * frames
    if len(groups) != frames:
        raise VolumenError(file, "is damaged", expected=f"{frames} descriptions of frames", found=len(groups))
    found = []
    for frame, group in enumerate(groups):
        position, axes, sizes, scaling = (
            _group(name, group, shared)
            for name in (
                "PlanePositionSequence",
                "PlaneOrientationSequence",
                "PixelMeasuresSequence",
                "PixelValueTransformationSequence",
            )
        )
        found.append(_slice(file, frame, position or {}, axes or {}, sizes or {}, scaling or {}))
    return found


def _group(name: str, group: Any, shared: Any) -> Any:
    for source in (group, shared):
        if source is not None and source.get(name):
            return source.get(name)[0]
    return None


def _slice(file: str, frame: int | None, position: Any, axes: Any, sizes: Any, scaling: Any) -> Slice:
    spacing = sizes.get("PixelSpacing") or sizes.get("ImagerPixelSpacing")
    slope, intercept = scaling.get("RescaleSlope"), scaling.get("RescaleIntercept")
    return Slice(
        file,
        frame,
        _floats(position.get("ImagePositionPatient"), 3),
        _floats(axes.get("ImageOrientationPatient"), 6),
        _floats(spacing, 2),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _floats(values: Any, count: int) -> tuple[float, ...] | None:
    return None if not values or len(values) != count else tuple(float(value) for value in values)


def _arranged(
    path: Path, slices: list[Slice], header: Any
) -> tuple[list[Slice], Geometry, np.ndarray | None]:
    """Return the slices in the order of their positions, and where the series lies."""
    first = slices[0]
    if first.axes is None or any(item.position is None for item in slices):
        if len(slices) > 1:
            raise VolumenError(
                path,
                expected="slices with a position and an orientation",
                found="none of them" if first.position is None else "some without",
                remedy="convert it with a program that knows its order",
            )
        sizes = None if first.spacing is None else (_thickness(header) or 1.0, *first.spacing)
        return slices, stated_geometry(sizes, "millimeter"), None
    for item in slices:
        if item.axes is None or not np.allclose(item.axes, first.axes, atol=_SAME_DIRECTION):
            raise VolumenError(
                item.file,
                expected="the orientation of the other slices",
                found=str(item.axes),
                remedy="move slices of other orientations, such as localizers, to a folder of their own",
            )
        if (item.spacing is None) != (first.spacing is None) or not np.allclose(
            item.spacing or (1, 1), first.spacing or (1, 1), rtol=1e-3
        ):
            raise VolumenError(
                item.file,
                expected=f"pixels of {first.spacing} mm, as in the other slices",
                found=str(item.spacing),
            )
    along_row, along_column = np.array(first.axes[:3]), np.array(first.axes[3:])
    pair = np.stack([along_row, along_column], axis=1)
    lengths = np.linalg.norm(pair, axis=0)
    if np.abs(lengths - 1).max() > _SAME_DIRECTION or not at_right_angles(pair):
        raise VolumenError(
            path,
            expected="rows and columns at right angles",
            found=f"ImageOrientationPatient {first.axes}",
            remedy="resample it to a rectangular grid",
        )
    normal = np.cross(along_row, along_column)
    slices = sorted(slices, key=lambda item: float(normal @ np.array(item.position)))
    step = _step(path, slices, normal) if len(slices) > 1 else _thickness(header) or 1.0
    if first.spacing is None:
        return slices, Geometry(), None
    directions = _LPS_TO_RAS[:, None] * np.stack([normal, along_column, along_row], axis=1)
    place = _LPS_TO_RAS * np.array(slices[0].position)
    spacing = (step, *first.spacing)
    geometry = stated_geometry(
        spacing, "millimeter", origin=place[::-1].tolist(), directions=directions[::-1], frame=PATIENT
    )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = (directions * np.array(spacing))[:, ::-1], place
    return slices, geometry, affine


def _thickness(header: Any) -> float | None:
    value = header.get("SpacingBetweenSlices") or header.get("SliceThickness")
    return float(value) if value else None


def _step(path: Path, slices: Sequence[Slice], normal: np.ndarray) -> float:
    """Return the distance of neighbouring slices.

    Raises:
        VolumenError: two slices at one position, a tilted gantry, missing slices, or distances that differ.
    """
    positions = np.array([item.position for item in slices])
    moves = np.diff(positions, axis=0)
    along = moves @ normal
    step = float(np.median(along))
    same = np.flatnonzero(along < max(abs(step) * _SAME_STEP, 1e-6))
    if len(same):
        one, other = slices[same[0]], slices[same[0] + 1]
        raise VolumenError(
            path,
            expected="one slice per position",
            found=f"two at {_place(one)}: {Path(one.file).name} and {Path(other.file).name}",
            remedy="move each time point or echo to a folder of its own",
        )
    sideways = np.linalg.norm(moves - along[:, None] * normal, axis=1)
    if (sideways > _SAME_STEP * step).any():
        angle = np.degrees(np.arctan2(np.median(sideways), step))
        raise VolumenError(
            path,
            expected="slices above each other",
            found=f"a tilted gantry ({angle:.3g} degrees)",
            remedy="resample it to a rectangular grid, for instance with dcm2niix",
        )
    odd = np.flatnonzero(np.abs(along - step) > _SAME_STEP * step)
    if len(odd):
        gap, number = float(along[odd[0]]), int(odd[0])
        absent = round(gap / step) - 1
        whole = absent > 0 and abs(gap - (absent + 1) * step) <= _SAME_STEP * step
        found = f"{gap:g} mm between {_place(slices[number])} and {_place(slices[number + 1])}"
        raise VolumenError(
            path,
            expected=f"a slice every {step:g} mm",
            found=f"{found}: {absent} missing" if whole else found,
            remedy="copy the series again" if whole else "resample it to a regular grid",
        )
    return float(along.mean())


def _place(item: Slice) -> str:
    return "(" + ", ".join(f"{value:g}" for value in item.position or ()) + ")"


def _dtype(header: Any, slices: Sequence[Slice]) -> np.dtype:
    """Return the type that holds the values: an integer if slopes and intercepts are, else float32."""
    bits, signed = int(header.get("BitsAllocated", 16)), bool(header.get("PixelRepresentation", 0))
    if bits not in (8, 16, 32):
        raise VolumenError(slices[0].file, expected="pixels of 8, 16 or 32 bits", found=f"{bits} bits")
    scales = {(item.slope, item.intercept) for item in slices}
    if scales == {(1.0, 0.0)}:
        return np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    if any(not float(value).is_integer() for scale in scales for value in scale):
        return np.dtype(np.float32)
    stored = int(header.get("BitsStored", bits))
    low, high = (-(1 << stored - 1), (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)
    ends = [value * slope + intercept for slope, intercept in scales for value in (low, high)]
    for name in ("int16", "int32"):
        if np.iinfo(name).min <= min(ends) and max(ends) <= np.iinfo(name).max:
            return np.dtype(name)
    return np.dtype(np.float32)
