"""Files at URLs, fetched whole into the cache."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from scripts.data.index_cache import default_cache_dir
from scripts.errors import VolumenError

logger = logging.getLogger(__name__)

_UNUSED_DAYS = 30
# What file systems and servers call the things that change with the content.
_VERSION = ("size", "ETag", "mtime", "LastModified", "last_modified", "created")


def fetch_file(url: str) -> Path:
    """Return a local copy of the file at a URL, fetched unless the same content was before.

    Copies lie in `files` beside the cached indices (see `index_cache`) and go when they were not used for 30 days;
    where the cache is off, they last as long as the process.

    Args:
        url: anything that fsspec opens as a file.

    Raises:
        VolumenError: it cannot be fetched.
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
            logger.info("%s: fetching the file", url)
            descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
            os.close(descriptor)
            try:
                filesystem.get_file(path, temporary)
                Path(temporary).replace(copy)
            finally:
                Path(temporary).unlink(missing_ok=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise VolumenError(
            url, f"cannot be fetched ({reason})", remedy="check the URL and the network"
        ) from error
    with suppress(OSError):
        os.utime(copy)
    return copy


def _folder() -> Path:
    kept = default_cache_dir()
    return Path(_temporary().name) if kept is None else kept.parent / "files"


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="volumen_")


def _remove_unused(folder: Path) -> None:
    """Remove copies that nobody used for long; another process may do the same."""
    for path in folder.glob("*/*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED_DAYS * 86_400:
                path.unlink()
                path.parent.rmdir()
