"""Detects the format of a file from its content, and defines the file name suffixes of each format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from volumen.data.formats.urls import format_scheme, is_url, names_in
from volumen.utils.errors import VolumenError

SUFFIXES = {
    "zarr": (".ome.zarr", ".zarr", ".ome.zarr.zip", ".zarr.zip", ".ozx"),
    "tif": (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".btf", ".tf8"),
    "nifti": (".nii.gz", ".nii"),
    "png": (".png",),
    "hdf5": (".h5", ".hdf5", ".hdf", ".ilp"),
    "mrc": (".mrc", ".rec", ".map"),
    "nrrd": (".nrrd", ".nhdr"),
    "precomputed": (".precomputed",),
    "n5": (".n5",),
    "metaimage": (".mha", ".mhd"),
    "dicom": (".dcm", ".dicom"),
    "webknossos": (".webknossos",),
}
"""File name suffixes per format, the longest of each family first."""

_ZARR_MARKS = ("zarr.json", ".zarray", ".zgroup")
_PRECOMPUTED_MARK = "info"
_N5_MARK = "attributes.json"
_WEBKNOSSOS_MARK = "datasource-properties.json"
_ZIP_MAGIC = b"PK\x03\x04"
_SYSTEM_NAMES = {
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "@tmp",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "__macosx",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
"""Names that file servers and operating systems create in every folder, in lower case."""
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GZIP_MAGIC = b"\x1f\x8b"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_NRRD_MAGIC = b"NRRD"
_MRC_MAGIC, _MRC_PLACE = b"MAP ", 208
_DICOM_MAGIC, _DICOM_PLACE = b"DICM", 128
_META_IMAGE_START = re.compile(rb"\s*(ObjectType|NDims|Comment)\s*=")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_SLICES = ("tif", "png")
"""Formats of slices; if a folder has several, the first takes precedence."""


_INNER = re.compile(r"(.+\.(?:h5|hdf5|hdf|ilp)):(/.*)", re.IGNORECASE)


def split_inner(path: object) -> tuple[str, str | None]:
    """Split "file.h5:/path/in/file" into the file and the path of the dataset; None where no dataset is named."""
    found = _INNER.fullmatch(str(path))
    if found is None or Path(str(path)).exists():
        return str(path), None
    return found[1], found[2].strip("/")


def split_suffix(name: str) -> tuple[str, str | None]:
    """Split "a.ome.zarr" into its stem "a" and the format of its suffix, "zarr" (None for an unknown suffix)."""
    for kind, endings in SUFFIXES.items():
        for ending in endings:
            if name.lower().endswith(ending) and len(name) > len(ending):
                return name[: -len(ending)], kind
    return name, None


def is_hidden(name: str) -> bool:
    """Return whether a name is that of a hidden file, or of one that a file server or operating system creates."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _is_n5(folder: Path) -> bool:
    """Return whether a folder is an N5 container, or a dataset or group in one; a group needs no attributes."""
    inside = any(part.name.lower().endswith(".n5") for part in (folder, *folder.parents))
    return inside or _holds(folder / _N5_MARK, b'"n5"') or _holds(folder / _N5_MARK, b'"blockSize"')


def is_zarr_folder(path: Path) -> bool:
    """Return whether a folder is a zarr array or group."""
    return any((path / mark).is_file() for mark in _ZARR_MARKS)


def volume_folder(folder: Path) -> str | None:
    """Return the format of a folder that is one volume, but no stack of slices; None for others."""
    if any((place / _WEBKNOSSOS_MARK).is_file() for place in (folder, folder.parent)):
        return "webknossos"  # a dataset or a layer, which may be a zarr group too
    if is_zarr_folder(folder):
        return "zarr"
    if _holds(folder / _PRECOMPUTED_MARK, b'"scales"'):
        return "precomputed"
    if _is_n5(folder):
        return "n5"
    return "dicom" if dicom_files(folder, first=True) else None


def dicom_files(folder: Path, *, first: bool = False) -> list[Path]:
    """Return the DICOM files of a folder, sorted by name.

    Args:
        folder: the folder.
        first: look at its first file only; the result is empty unless that one is DICOM.
    """
    found = []
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        path = folder / name
        if is_hidden(name) or name.upper() == "DICOMDIR" or not path.is_file():
            continue
        with path.open("rb") as stream:
            stream.seek(_DICOM_PLACE)
            if stream.read(len(_DICOM_MAGIC)) == _DICOM_MAGIC:
                found.append(path)
        if first:
            break
    return found


def _holds(file: Path, mark: bytes) -> bool:
    """Return whether a small file contains some text."""
    try:
        return file.is_file() and mark in file.read_bytes()
    except OSError:
        return False


def stack_files(folder: Path) -> tuple[str, ...]:
    """Return the files of a folder that are slices of one volume, see `stack_order`."""
    return stack_order(os.listdir(folder))  # noqa: PTH208


def stack_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return the TIFF files, else the PNG files, in the order of their numbers; none unless their names differ in one
    number only.

    Other files and hidden ones (see `is_hidden`) are ignored.
    """
    kinds = {name: split_suffix(name)[1] for name in names if not is_hidden(name)}
    chosen = next((kind for kind in _SLICES if kind in kinds.values()), None)
    if chosen is None:
        return ()
    names = [name for name, kind in kinds.items() if kind == chosen]
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({tuple(part[::2]) for part in parts}) != 1:
        return ()
    differing = sum(len({int(digits) for digits in column}) > 1 for column in zip(*(p[1::2] for p in parts)))
    if differing > 1 or len(parts[0]) < 3:
        return ()
    order = sorted(range(len(names)), key=lambda i: [int(digits) for digits in parts[i][1::2]])
    return tuple(names[i] for i in order)


def folder_kind(names: Iterable[str]) -> str | None:
    """Return the kind of a folder with these names: "zarr", "precomputed", "n5", "webknossos", "stack" (of slices), or
    None.
    """
    names = list(names)
    if any(mark in names for mark in _ZARR_MARKS):
        return "zarr"
    for mark, kind in (
        (_WEBKNOSSOS_MARK, "webknossos"),
        (_PRECOMPUTED_MARK, "precomputed"),
        (_N5_MARK, "n5"),
    ):
        if mark in names:
            return kind
    return "stack" if stack_order(names) else None


def _url_format(url: str) -> str:
    if (stated := format_scheme(url)) is not None:
        return stated
    kind = split_suffix(url.rstrip("/"))[1]
    for mark, inside in ((".zarr/", "zarr"), (".n5/", "n5")):
        if kind is None and mark in url:
            return inside
    if kind is not None:
        return kind
    try:
        return folder_kind(names_in(url)) or "zarr"
    except VolumenError:  # zarr needs no list of its files, which many servers do not provide
        return "zarr"


def detect_format(path: str | os.PathLike) -> str:
    """Return the format of a volume by looking into the file: a key of `SUFFIXES`, or "stack" for a folder of slices.

    For a URL the suffix of the name decides; without a suffix, the names that the server lists.

    Raises:
        VolumenError: the path does not exist, cannot be read, or has none of these formats.
    """
    if is_url(path):
        return _url_format(str(path))
    file = Path(split_inner(path)[0])
    try:
        if file.is_dir():
            os.listdir(file)  # noqa: PTH208  (raises where permissions are missing)
            return _folder_format(file)
        with file.open("rb") as handle:
            head = handle.read(352)
    except FileNotFoundError:
        # For a missing path inside a zarr (a.zarr/0), the message of the zarr reader is better.
        if any(part.endswith(".zarr") for part in file.parts[:-1]):
            return "zarr"
        raise VolumenError(file, "no such file or folder", remedy="check the path") from None
    except NotADirectoryError:
        return "zarr"  # a path in a zip archive
    except PermissionError:
        raise VolumenError(
            file, "may not be read", remedy="give yourself read permission (chmod u+r)"
        ) from None
    return _file_format(file, head)


def _folder_format(folder: Path) -> str:
    if (kind := volume_folder(folder)) is not None:
        return kind
    if folder.name.endswith(".zarr") or _inside_zarr(folder):
        return "zarr"
    if stack_files(folder):
        return "stack"
    raise VolumenError(
        folder,
        expected="a volume, or a folder of numbered TIFF or PNG slices",
        found="a folder without zarr metadata",
    )


def _inside_zarr(folder: Path) -> bool:
    return any(is_zarr_folder(parent) for parent in folder.parents)


def _file_format(file: Path, head: bytes) -> str:
    if not head:
        raise VolumenError(file, "is empty (0 bytes)", remedy="copy it again")
    if head[:4] in _TIFF_MAGIC:
        return "tif"
    if head[:8] == PNG_MAGIC:
        return "png"
    if head[:4] == _ZIP_MAGIC:
        return "zarr"
    if head[:2] == _GZIP_MAGIC and file.name.lower().endswith(".gz"):
        return "nifti"
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] == b"n+2":
        return "nifti"
    if head[:8] == _HDF5_MAGIC:
        return "hdf5"
    if head[:4] == _NRRD_MAGIC:
        return "nrrd"
    if head[_DICOM_PLACE:].startswith(_DICOM_MAGIC):
        return "dicom"
    if _META_IMAGE_START.match(head):
        return "metaimage"
    # Older MRC files have no mark.
    if head[_MRC_PLACE:].startswith(_MRC_MAGIC) or split_suffix(file.name)[1] == "mrc":
        return "mrc"
    raise VolumenError(
        file,
        expected="zarr, TIFF, NIfTI, PNG, HDF5, MRC, NRRD, MetaImage or DICOM",
        found=f"a file that starts with {head[:8]!r}",
        remedy="convert it, or copy it again if it should be one of these",
    )
