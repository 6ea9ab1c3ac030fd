"""Fetches whole files from URLs into the cache."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from volumen.data.caching.index_cache import default_cache_dir, is_writable
from volumen.utils.errors import VolumenError, file_fault
from volumen.utils.files.atomic import replacing, sync_file

logger = logging.getLogger(__name__)

_UNUSED_DAYS = 30
# Names that file systems and servers use for properties that change with the content.
_VERSION = ("size", "ETag", "mtime", "LastModified", "last_modified", "created")


def fetch_file(url: str, *, level: int = logging.INFO) -> Path:
    """Return a local copy of the file at a URL; it is fetched unless the cache has the same content.

    Copies lie in `files` beside the cached indices (see `index_cache`) and are removed when they have not been used for
    30 days; if the cache is off or cannot be written to, they exist until the process ends.

    Args:
        url: any URL that fsspec opens as a file.
        level: logging level of the message about the fetch.

    Raises:
        VolumenError: the file cannot be fetched.
    """
    try:
        import fsspec
    except ImportError:
        raise VolumenError(url, "URLs need fsspec", remedy="pip install 'volumen[remote]'") from None
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        known = filesystem.info(path)
        state = " ".join([url, filesystem.ukey(path), *(str(known.get(key)) for key in _VERSION)])
        folder = _folder() / hashlib.sha256(state.encode()).hexdigest()[:32]
        copy = folder / url.rstrip("/").rsplit("/", 1)[-1]
        if not copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _remove_unused(folder.parent)
            logger.log(level, "%s: fetching the file", url)
            with replacing(copy) as temporary:
                filesystem.get_file(path, str(temporary))
                sync_file(temporary)
    except Exception as error:
        raise file_fault(error, url, "cannot be fetched", remedy="check the URL and the network") from error
    with suppress(OSError):
        os.utime(copy)
    return copy


def file_states(folder: str, names: Sequence[str]) -> list[str]:
    """Return one line per file of a folder at a URL; it changes with the content if the server's list shows this.

    Raises:
        VolumenError: the folder cannot be listed.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(folder)
        listed = {str(item["name"]).rsplit("/", 1)[-1]: item for item in filesystem.ls(path, detail=True)}
    except Exception as error:
        raise file_fault(error, folder, "cannot be listed", remedy="check the URL and the network") from error
    states = [(name, listed.get(name, {})) for name in names]
    return [" ".join([folder, name, *(str(known.get(key)) for key in _VERSION)]) for name, known in states]


def _folder() -> Path:
    folder = default_cache_dir()
    if folder is None or not is_writable(folder.parent / "files"):
        return Path(_temporary().name)
    return folder.parent / "files"


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="volumen_")


@cache
def _remove_unused(folder: Path) -> None:
    """Remove copies that have not been used for a long time, once per process; other processes may do the same."""
    for path in folder.glob("*/*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED_DAYS * 86_400:
                path.unlink()
                path.parent.rmdir()
