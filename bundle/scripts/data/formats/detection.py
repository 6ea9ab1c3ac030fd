"""Detects the format of a file from its content, and defines the file name suffixes of each format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from volumen.data.formats.urls import format_scheme, is_url, names_in
from volumen.utils.errors import VolumenError

SUFFIXES = {
    "zarr": (".ome.zarr", ".zarr"),
    "tif": (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".btf", ".tf8"),
    "nifti": (".nii.gz", ".nii"),
    "png": (".png",),
    "hdf5": (".h5", ".hdf5", ".hdf", ".ilp"),
    "mrc": (".mrc", ".rec", ".map"),
    "nrrd": (".nrrd", ".nhdr"),
    "precomputed": (".precomputed",),
}
"""File name suffixes per format, the longest of each family first."""

FOLDERS = ("zarr", "precomputed")
"""Formats of volumes that are folders."""
_ZARR_MARKS = ("zarr.json", ".zarray", ".zgroup")
_PRECOMPUTED_MARK = "info"
_N5_MARK = "attributes.json"
_ZIP_MAGIC = b"PK\x03\x04"
_UNSUPPORTED = {".zarr.zip": "zip", ".ozx": "zip", ".n5": "n5"}
"""Suffixes of containers that are recognised but not supported."""
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
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_SLICES = ("tif", "png")
"""Formats of slices; if a folder has several, the first takes precedence."""


"""`scheme://`, or fsspec's chained `cache::scheme://`; another colon may be part of a file name."""


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


def unsupported_container(name: str) -> VolumenError | None:
    """Return the error for a container with an unsupported suffix, with a remedy; None for other names."""
    kind = next(
        (kind for ending, kind in _UNSUPPORTED.items() if name.lower().rstrip("/").endswith(ending)), None
    )
    return {"zip": _zipped, "n5": _n5}[kind](name) if kind else None


def _zipped(where: object) -> VolumenError:
    return VolumenError(where, "is a zip archive", remedy="unzip it: a zarr is read from a folder")


def _n5(where: object) -> VolumenError:
    return VolumenError(
        where,
        "is an N5 container, which is not read",
        remedy="save it as OME-Zarr, for instance in Fiji (File > Save As > HDF5/N5/Zarr/OME-NGFF)",
    )


def _is_n5(folder: Path) -> bool:
    return folder.name.lower().endswith(".n5") or (folder / _N5_MARK).is_file()


def is_zarr_folder(path: Path) -> bool:
    """Return whether a folder is a zarr array or group."""
    return any((path / mark).is_file() for mark in _ZARR_MARKS)


def special_folder(folder: Path) -> str | None:
    """Return the format of a folder that is one volume, but neither zarr nor a stack of slices; None for others."""
    if _holds(folder / _PRECOMPUTED_MARK, b'"scales"'):
        return "precomputed"
    return None


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
    """Return the kind of a folder with these names: "zarr", "precomputed", "stack" (of slices), or None."""
    names = list(names)
    if any(mark in names for mark in _ZARR_MARKS):
        return "zarr"
    if _PRECOMPUTED_MARK in names:
        return "precomputed"
    return "stack" if stack_order(names) else None


def _url_format(url: str) -> str:
    if (stated := format_scheme(url)) is not None:
        return stated
    kind = split_suffix(url.rstrip("/"))[1]
    if kind is not None or ".zarr/" in url:
        return kind or "zarr"
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
    except PermissionError:
        raise VolumenError(
            file, "may not be read", remedy="give yourself read permission (chmod u+r)"
        ) from None
    return _file_format(file, head)


def _folder_format(folder: Path) -> str:
    if is_zarr_folder(folder):
        return "zarr"
    if (kind := special_folder(folder)) is not None:
        return kind
    if _is_n5(folder):
        raise _n5(folder)
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
        raise _zipped(file)
    if head[:2] == _GZIP_MAGIC and file.name.lower().endswith(".gz"):
        return "nifti"
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] == b"n+2":
        return "nifti"
    if head[:8] == _HDF5_MAGIC:
        return "hdf5"
    if head[:4] == _NRRD_MAGIC:
        return "nrrd"
    # Older MRC files have no mark.
    if head[_MRC_PLACE:].startswith(_MRC_MAGIC) or split_suffix(file.name)[1] == "mrc":
        return "mrc"
    raise VolumenError(
        file,
        expected="zarr, TIFF, NIfTI, PNG, HDF5, MRC or NRRD",
        found=f"a file that starts with {head[:8]!r}",
        remedy="convert it, or copy it again if it should be one of these",
    )
