"""Writes files atomically: after any interruption of process or machine a file is complete or does not exist."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

logger = logging.getLogger(__name__)

UNFINISHED = ".*.tmp"
"""Pattern of the temporary file names that a killed process leaves."""


def write_atomically(
    path: Path, content: bytes | Callable[[BinaryIO], object], *, durable: bool = True
) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it and flush the folder.

    A crash or power cut at any moment leaves either the previous file or the new one. Several processes
    may write the same file at once; the last one's content remains.

    Args:
        path: the final name.
        content: the bytes, or what writes them, called with the open binary file.
        durable: wait until file and folder have reached the disk. Without it, readers see the whole file or none all
            the same, but after a power cut it may hold anything: for what can be recomputed.

    Raises:
        OSError: the disk is full or cannot be written. No partial file remains.
    """
    with replacing(path, durable=durable) as temporary, temporary.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary name for a file to be made, which gets its own name where the block ends without an error.

    The block must flush the file to the disk; `sync_file` does that.

    Args:
        path: the final name.
        durable: wait until the folder has reached the disk.

    Yields:
        A name in the same folder that no other process uses; no file of this name remains.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:16]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        _remove_quietly(temporary)
        raise


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, if the system allows it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        logger.debug("cannot flush folder %s: %s", folder, error)
    finally:
        os.close(descriptor)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.debug("cannot remove %s: %s", path, error)
