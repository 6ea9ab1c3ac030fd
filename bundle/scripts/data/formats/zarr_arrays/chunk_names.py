"""Parses the names of chunk files of a zarr array."""

from __future__ import annotations

from collections.abc import Sequence


def chunk_index(parts: Sequence[str], ndim: int) -> tuple[int, ...] | None:
    """Return the chunk index that a file name contains; None for other files.

    Args:
        parts: the path below the array, split at every slash and dot: `c/0/1/2` or `c.0.1.2` (v3), `0.1.2` or
            `0/1/2` (v2).
        ndim: number of axes of the array.
    """
    numbers = parts[1:] if parts and parts[0] == "c" else parts
    if len(numbers) != ndim or not all(part.isdigit() for part in numbers):
        return None
    return tuple(int(part) for part in numbers)
