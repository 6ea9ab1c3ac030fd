"""Reads and writes at a place of an open file, also where the system has no calls for it (Windows)."""

from __future__ import annotations

import os
import threading
from typing import Any

BINARY = getattr(os, "O_BINARY", 0)
"""Flag for `os.open`: Windows changes line ends without it."""

# Without `pread` the place is a property of the open file, which threads share.
_SEEKING = threading.Lock()


def read_into(descriptor: int, buffer: Any, start: int) -> int:
    """Read from a byte of a file on into a buffer of bytes.

    Returns:
        How many bytes were read: less than the buffer holds at the end of the file, or where the system reads in parts.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], start)
    data = read_at(descriptor, len(buffer), start)
    memoryview(buffer)[: len(data)] = data
    return len(data)


def read_at(descriptor: int, length: int, start: int) -> bytes:
    """Return up to `length` bytes of a file from a byte on, as `os.pread` does."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, start)
    with _SEEKING:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, length)


def write_at(descriptor: int, data: Any, start: int) -> int:
    """Write bytes to a file from a byte on, as `os.pwrite` does; return how many were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, start)
    with _SEEKING:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.write(descriptor, data)
