"""Regions of arrays that lie raw, in one piece, in a file."""

from __future__ import annotations

import mmap
import os
from math import prod
from typing import BinaryIO, Literal

import numpy as np

from scripts.errors import VolumenError


def read_raw(
    file: BinaryIO,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    region: tuple[slice, ...],
    order: Literal["C", "F"] = "C",
) -> np.ndarray:
    """Copy a region out of raw voxels, in native byte order, mapping the file for this read only.

    A mapping that stays would keep every page that was ever read in the process's resident memory.

    Args:
        file: the open file.
        offset: byte at which the array starts.
        shape: shape of the whole array.
        dtype: its type, byte order included.
        region: what to read.
        order: "C" if the last axis is contiguous, "F" if the first is.

    Raises:
        VolumenError: the file ends before the array does.
    """
    found = os.fstat(file.fileno()).st_size
    needed = offset + prod(shape) * dtype.itemsize
    if found < needed:
        # Reading a map beyond the end of a file kills the process.
        raise too_short(file.name, needed, found)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(file.fileno(), needed - start, access=mmap.ACCESS_READ, offset=start) as mapped:
        array: np.ndarray = np.ndarray(shape, dtype, buffer=mapped, offset=offset - start, order=order)
        block = np.array(array[region], dtype.newbyteorder("="))
        del array
    return block


def too_short(path: object, needed: int, found: int) -> VolumenError:
    """Return the error for a file that ends too early."""
    return VolumenError(
        path,
        "is shorter than its header says",
        expected=f"{needed} bytes",
        found=f"{found}",
        remedy="copy or write it again",
    )
