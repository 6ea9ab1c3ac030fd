"""Zarr in a zip archive: splits a path into the archive and the node in it, and opens nodes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from volumen.data.formats.urls import is_url
from volumen.utils.errors import VolumenError, file_fault

_MARKS = ("zarr.json", ".zgroup", ".zarray")


def split_archive(path: str) -> tuple[Path, str] | None:
    """Split "a.zarr.zip/inner" into the archive and the path in it; None if no part of the path is a file."""
    if is_url(path):
        return None
    whole = Path(path)
    for part in (whole, *whole.parents):
        if part.is_file():
            return part, "" if part == whole else whole.relative_to(part).as_posix()
        if part.is_dir():
            return None
    return None


def open_zipped(archive: Path, inner: str) -> Any:
    """Return the array or group at a path of an archive.

    Raises:
        VolumenError: the archive is damaged, or there is no zarr at this path.
    """
    import zarr

    try:
        lead = _folder_in(archive)
        store = zarr.storage.ZipStore(archive, mode="r")
        return zarr.open(store, path="/".join(part for part in (lead, inner) if part), mode="r")
    except (FileNotFoundError, KeyError):
        raise VolumenError(
            f"{archive}/{inner}".rstrip("/"), "no zarr array or group there", remedy="check the path"
        ) from None
    except Exception as error:
        raise file_fault(
            error, archive, "cannot be read as a zipped zarr", remedy="copy it again, or unzip it"
        ) from error


def _folder_in(archive: Path) -> str:
    """Return the only folder in which an archive holds a zarr; empty if the zarr is the archive itself."""
    with zipfile.ZipFile(archive) as content:
        names = content.namelist()
    if any(name in _MARKS for name in names):
        return ""
    tops = {name.split("/")[0] for name in names if name.count("/") == 1 and name.split("/")[1] in _MARKS}
    return tops.pop() if len(tops) == 1 else ""
