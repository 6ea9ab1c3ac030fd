"""Paths and URLs of volumes, and the names in a folder at either."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from volumen.utils.errors import VolumenError, file_fault
from volumen.utils.memory_pool import share_memory_between_threads

_URL = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(path: str | os.PathLike) -> bool:
    """Return whether a path is a URL (`scheme://`, or fsspec's chained `a::scheme://`)."""
    return _URL.match(str(path)) is not None


def local_path(path: str | os.PathLike) -> str | os.PathLike:
    """Convert a `file://` URL to a path; other paths are unchanged."""
    text = str(path)
    return unquote(text.removeprefix("file://")) if text.startswith("file://") else path


_FORMAT_SCHEME = re.compile(r"(precomputed|n5)://(?=[a-z0-9+.-]+://|/)", re.IGNORECASE)


def format_scheme(path: str | os.PathLike) -> str | None:
    """Return the format that neuroglancer's way of writing a source names: "precomputed" of `precomputed://URL`."""
    found = _FORMAT_SCHEME.match(str(path))
    return found[1].lower() if found else None


def without_scheme(path: str) -> str:
    """Return a path or URL without the format that it begins with, see `format_scheme`."""
    return str(local_path(_FORMAT_SCHEME.sub("", path, count=1)))


def child(root: str, *names: str) -> str:
    """Join a path or URL and names below it."""
    if is_url(root):
        return "/".join([root.rstrip("/"), *names])
    return str(Path(root, *names))


def names_in(folder: str) -> list[str]:
    """List all names in a folder, for messages."""
    if is_url(folder):
        return sorted(remote_names(folder))
    return sorted(os.listdir(folder))  # noqa: PTH208


def remote_names(folder: str) -> list[str]:
    """List the names at a URL; none where nothing is there."""
    return [name for name, _ in remote_items(folder)]


def remote_items(folder: str) -> list[tuple[str, bool]]:
    """List the names at a URL, each with a flag that is true for a folder."""
    try:
        import fsspec
    except ImportError:
        raise VolumenError(folder, "URLs need fsspec", remedy="pip install 'volumen[remote]'") from None
    share_memory_between_threads()
    try:
        filesystem, path = fsspec.core.url_to_fs(folder)
        listed = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return []
    except Exception as error:
        raise file_fault(error, folder, "cannot be listed", remedy="check the URL and the network") from error
    items = {
        str(item["name"]).rstrip("/").rsplit("/", 1)[-1]: item.get("type") == "directory" for item in listed
    }
    return [(name, is_folder) for name, is_folder in items.items() if name and not name.startswith("?")]
