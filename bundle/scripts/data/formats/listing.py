"""Lists the volumes of a folder on disk or at a URL."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from volumen.data.formats.detection import (
    folder_kind,
    is_hidden,
    split_suffix,
    stack_files,
    stack_order,
    volume_folder,
)
from volumen.data.formats.urls import child, is_url, remote_items, remote_names
from volumen.utils.errors import VolumenError


@dataclass(frozen=True)
class Entry:
    """A volume in a folder: its name without suffix (Unicode NFC), its format, and its path or URL."""

    name: str
    format: str
    path: str


def list_volumes(folder: str) -> list[Entry]:
    """List the volumes in a folder, sorted by name; suffix and content decide what is a volume.

    Hidden files, folders of file servers (`@eaDir`) and files of other kinds are ignored. Links are followed.

    Raises:
        VolumenError: permission to read the folder or one of its volumes is missing, or a link is broken.
    """
    entries = _remote_entries(folder) if is_url(folder) else _local_entries(Path(folder))
    return sorted(entries, key=lambda entry: (entry.name, entry.path))


def folder_exists(folder: str) -> bool:
    """Return whether a folder exists, on disk or at a URL."""
    if is_url(folder):
        return bool(remote_names(folder))
    try:
        return Path(folder).is_dir()
    except PermissionError:
        raise _forbidden(folder) from None


def refuse_file(folder: str, remedy: str) -> None:
    """Refuse a file or a broken link where a folder is expected; a missing folder is not refused here.

    Raises:
        VolumenError: it is a file or a broken link; names it.
    """
    if not is_url(folder) and os.path.lexists(folder) and not Path(folder).is_dir():
        found = "a file" if Path(folder).exists() else "a link that leads nowhere"
        raise VolumenError(folder, expected="a folder", found=found, remedy=remedy)


def _local_entries(folder: Path) -> Iterator[Entry]:
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208  (a path object for each of thousands takes long to sort)
    except PermissionError:
        raise VolumenError(
            folder, "may not be read", remedy="give yourself permission (chmod u+rx)"
        ) from None
    for name in names:
        path = os.path.join(folder, name)  # noqa: PTH118
        if is_hidden(name):
            continue
        stem, kind = split_suffix(name)
        if kind is not None and not os.path.exists(path):  # noqa: PTH110
            raise VolumenError(path, "is a link that leads nowhere", remedy="repair or remove it")
        if kind is None:
            stem, kind = _folder_entry(Path(path))
        if kind is not None:
            yield Entry(unicodedata.normalize("NFC", stem), kind, path)


def _folder_entry(path: Path) -> tuple[str, str | None]:
    """Return name and format of a folder without suffix: one volume or a stack of slices, else no format."""
    if path.is_dir():
        if (kind := volume_folder(path)) is not None:
            return path.name, kind
        if files := stack_files(path):
            return path.name, split_suffix(files[0])[1]
    return path.name, None


def _forbidden(folder: object) -> VolumenError:
    return VolumenError(folder, "may not be read", remedy="give yourself permission (chmod u+rx)")


def _remote_entries(folder: str) -> Iterator[Entry]:
    for name, is_folder in remote_items(folder):
        path = child(folder, name)
        if is_hidden(name):
            continue
        stem, kind = split_suffix(name)
        if kind is None and is_folder:
            names = remote_names(path)
            kind, stem = folder_kind(names), name
            if kind == "stack":
                kind = split_suffix(stack_order(names)[0])[1]
        if kind is not None:
            yield Entry(unicodedata.normalize("NFC", stem), kind, path)
