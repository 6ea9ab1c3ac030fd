"""A folder of cached arrays: keyed by content, written atomically, recomputed when damaged, limited in size.

The folder is `$VOLUMEN_CACHE`, else `volumen/patches` in the user's cache folder; `VOLUMEN_CACHE=off` stores
nothing. The least recently used files are removed once the folder holds more than `MAX_BYTES` or `MAX_FILES`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from volumen.utils.files.arrays import read_arrays
from volumen.utils.files.atomic import write_atomically

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30
MAX_FILES = 1000
_STALE_SECONDS = 86_400
"""Age from which a temporary file counts as left by a killed process."""


def default_cache_dir() -> Path | None:
    """Return the user's folder for cached arrays, or None if `VOLUMEN_CACHE` is off or there is no home folder.

    Warns once if there is no home folder, as in a container that runs under a bare user id.
    """
    chosen = os.environ.get("VOLUMEN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen is not None:
            return None if chosen.strip().lower() in ("", "0", "off", "none") else Path(chosen).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "volumen" / "patches"
    except RuntimeError:
        _warn_once("nothing is cached: this user has no home folder; set VOLUMEN_CACHE to a folder")
        return None


def is_writable(folder: Path) -> bool:
    """Return whether a folder exists or can be created, and files can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def cache_path(folder: Path, key: Mapping[str, Any]) -> Path:
    """Return the file that holds the arrays for a key (plain data, hashed as canonical JSON)."""
    return folder / f"valid_patches_{hashlib.sha256(_canonical(key)).hexdigest()[:32]}.npz"


def load_arrays(folder: Path, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Return the cached arrays, or None if there are none or the file is damaged (which is logged)."""
    path = cache_path(folder, key)
    try:
        arrays = read_arrays(path)
        if arrays.pop("key").tobytes() != _canonical(key):
            raise ValueError("it belongs to other parameters")
        _touch(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s: the cached patch index cannot be used (%s); it is built again", path, error)
        return None
    return arrays


def store_arrays(folder: Path, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of a key: first under a temporary name, then renamed, so that no reader sees half a file.

    The file is not flushed to disk: one that a power cut damages is recomputed. A folder that cannot be written to,
    or a full disk, causes one warning: the arrays then exist in memory only.
    """
    path = cache_path(folder, key)
    content: Any = {"key": np.frombuffer(_canonical(key), np.uint8), **arrays}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **content), durable=False)
        _prune_once(folder)
    except OSError as error:
        _warn_once(f"{folder}: nothing is cached there ({error.strerror or error})")


@cache
def _prune_once(folder: Path) -> None:
    """Prune a folder once in this process, since listing it takes longer than writing a file to it."""
    prune(folder)


def prune(
    folder: Path, *, keep: Path | None = None, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES
) -> None:
    """Remove the least recently used files until the folder is within its limits.

    Files with other names are not touched. Another process may prune at the same time.

    Args:
        folder: folder of cached arrays.
        keep: a file that is never removed.
        max_bytes, max_files: the limits.
    """
    now, total, count = time.time(), 0, 0
    entries = []
    for path in folder.glob("*valid_patches_*"):
        with suppress(OSError):
            status = path.stat()
            entries.append((status.st_mtime_ns, status.st_size, path))
    # Newest first: files within the limits stay.
    for modified, size, path in sorted(entries, reverse=True):
        if path.suffix == ".tmp":
            if now - modified / 1e9 > _STALE_SECONDS:
                path.unlink(missing_ok=True)
            continue
        total, count = total + size, count + 1
        if path != keep and (total > max_bytes or count > max_files):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    with suppress(OSError):  # the folder is read-only
        os.utime(path)


def _canonical(key: Mapping[str, Any]) -> bytes:
    return json.dumps(key, sort_keys=True, separators=(",", ":")).encode()
