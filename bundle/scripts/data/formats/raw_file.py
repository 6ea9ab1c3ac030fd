"""Reads regions of arrays that are stored uncompressed and contiguous in a file."""

from __future__ import annotations

from math import prod
from typing import BinaryIO, Literal

import numpy as np

from volumen.utils.errors import VolumenError
from volumen.utils.files.positioned_io import read_into

_CALL_BYTES = 8192
"""The fixed overhead of a read call, expressed as the number of bytes that could be copied in that time."""
_LARGEST_RUN = 32 * 2**20


def read_raw(
    file: BinaryIO,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    region: tuple[slice, ...],
    order: Literal["C", "F"] = "C",
) -> np.ndarray:
    """Copy a region out of raw voxels, in native byte order. Safe to call from many threads.

    Reads runs of bytes instead of memory-mapping the file: a memory map counts every page that it ever touched as
    memory of the process, causes a page fault per row of a patch, and kills the process if the file has shrunk.

    Args:
        file: the open file.
        offset: byte at which the array starts.
        shape: shape of the whole array.
        dtype: type of the array, byte order included.
        region: one slice per axis.
        order: "C" if the last axis is contiguous, "F" if the first is.

    Raises:
        VolumenError: the file ends before the array does.
    """
    if order == "F":
        block = read_raw(file, offset, shape[::-1], dtype, region[::-1])
        return block.transpose()
    sizes = tuple(part.stop - part.start for part in region)
    out = np.empty(sizes, dtype.newbyteorder("="))
    if not out.size:
        return out
    strides = [prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    axis = _run_axis(sizes, strides)
    length = sizes[axis] * strides[axis]
    corner = offset + sum(part.start * stride for part, stride in zip(region, strides))
    # A run begins at the start of its rows, so that it can be reshaped to the array's shape.
    corner -= sum(part.start * stride for part, stride in zip(region[axis + 1 :], strides[axis + 1 :]))
    inner = (slice(None), *region[axis + 1 :])
    buffer = bytearray(length)
    run = np.frombuffer(buffer, dtype).reshape(sizes[axis], *shape[axis + 1 :])[inner]
    for index in np.ndindex(sizes[:axis]):
        start = corner + sum(i * stride for i, stride in zip(index, strides))
        found = read_into(file.fileno(), buffer, start)
        if found != length:
            raise too_short(file.name, offset + prod(shape) * dtype.itemsize, start + found)
        out[index] = run
    return out


def _run_axis(sizes: tuple[int, ...], strides: list[int]) -> int:
    """Choose the axis along which one call reads: a longer run needs fewer calls but copies more unused bytes."""

    def cost(axis: int) -> int:
        return prod(sizes[:axis]) * (_CALL_BYTES + sizes[axis] * strides[axis])

    axes = [axis for axis in range(len(sizes)) if sizes[axis] * strides[axis] <= _LARGEST_RUN]
    return min(axes, key=cost, default=len(sizes) - 1)


def too_short(path: object, needed: int, found: int) -> VolumenError:
    """Return the error for a file that ends too early."""
    return VolumenError(
        path,
        "is shorter than its header says",
        expected=f"{needed} bytes",
        found=f"{found}",
        remedy="copy or write it again",
    )
