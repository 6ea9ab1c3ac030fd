"""Short hashes that change with the content of a file, folder or array, and a digest that is equal for a copy."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np

_HEAD = 64 * 1024
_MAX_ENTRIES = 200_000


def digest(parts: Iterable[object]) -> str:
    """Hash the text of some values, one per line, to 32 hexadecimal digits; they need not fit in memory."""
    hashed = hashlib.blake2b(digest_size=16)
    for number, part in enumerate(parts):
        hashed.update((f"\n{part}" if number else str(part)).encode())
    return hashed.hexdigest()


def file_fingerprint(path: Path, *details: object) -> str:
    """Hash size, modification time and first 64 KiB of a file; not its name, so that moving it changes nothing."""
    # A file object would allocate the whole head for each of thousands of small files.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        stat = os.fstat(descriptor)
        head = os.read(descriptor, min(stat.st_size, _HEAD))
    finally:
        os.close(descriptor)
    return digest([stat.st_size, stat.st_mtime_ns, zlib.crc32(head), *details])


def files_fingerprint(paths: Iterable[str | Path], *details: object) -> str:
    """Hash several files like `file_fingerprint`, such as a header and its voxels; a file named twice counts once."""
    return digest([file_fingerprint(Path(path), *details) for path in dict.fromkeys(paths)])


def folder_fingerprint(folder: Path, *details: object) -> str:
    """Hash names, sizes and modification times of all files below a folder.

    After 200,000 files, only the modification times and numbers of files of the remaining folders enter the hash.
    """
    return digest(chain(_entries(folder), details))


def _entries(folder: Path) -> Iterator[str]:
    count = 0
    for where, folders, files in os.walk(folder):
        folders.sort()
        relative = os.path.relpath(where, folder)
        if count > _MAX_ENTRIES:
            yield f"{relative} {os.stat(where).st_mtime_ns} {len(files)}"  # noqa: PTH116
            continue
        for name in sorted(files):
            stat = os.stat(os.path.join(where, name))  # noqa: PTH116, PTH118
            yield f"{relative}/{name} {stat.st_size} {stat.st_mtime_ns}"
            count += 1


def array_fingerprint(array: Any) -> str:
    """Hash all values of an array in memory, or the token of a lazy one (dask); another lazy array is never equal."""
    header = (array.shape, array.dtype)
    if isinstance(array, np.ndarray):
        checksum = 0
        for plane in np.atleast_1d(array):
            checksum = zlib.crc32(np.ascontiguousarray(plane).view(np.uint8).data, checksum)
        return digest([*header, checksum])
    token = getattr(array, "name", None) if hasattr(array, "dask") else None
    return digest([*header, token or uuid4()])


def fingerprint_of(volume: Any) -> str:
    """Return `volume.fingerprint()`, computed once for each opened volume."""
    with _LOCK:
        known = _FINGERPRINTS.get(volume)
    if known is None:
        known = volume.fingerprint()
        with _LOCK:
            _FINGERPRINTS[volume] = known
    return known


_FINGERPRINTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_LOCK = threading.Lock()


def content_digests(volumes: Mapping[str, Any], *, block: int = 32) -> dict[str, str]:
    """Return digests that identify volumes independently of their paths and of the times of their files.

    Args:
        volumes: `Volume` by name.
        block: voxels per axis of the sample that is read from the middle of each volume.

    Returns:
        By name: SHA-256, in hexadecimal digits, of the shape, the type and the sample's bytes.
    """
    digests = {}
    for name, volume in sorted(volumes.items()):
        middle = tuple(
            slice(max(0, extent // 2 - block // 2), min(extent, extent // 2 + block // 2 + 1))
            for extent in volume.shape
        )
        hashed = hashlib.sha256(f"{volume.channels} {volume.shape} {np.dtype(volume.dtype).name}".encode())
        hashed.update(np.ascontiguousarray(volume.read(middle)).tobytes())
        digests[name] = hashed.hexdigest()
    return digests


def joined_digest(digests: Mapping[str, str]) -> str:
    """Return one digest of names and digests, in hexadecimal digits."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
