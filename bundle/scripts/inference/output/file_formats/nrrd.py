"""Writes NRRD files slab by slab."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from volumen.inference.output.file_formats.slabs import first_voxel, slabs, wide
from volumen.inference.output.ome_zarr import ZarrOutput

_TYPES = {"uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "float32": "float"}
_UNITS = {"millimeter": "mm", "micrometer": "um", "nanometer": "nm", "meter": "m", "centimeter": "cm"}


def write_nrrd(
    path: Path, arrays: ZarrOutput, target: str, affine: np.ndarray | None, *, compress: bool
) -> None:
    """Write a target as NRRD, axes (X, Y, Z[, C]), with the place of the image.

    An image with an affine lies in the space right-anterior-superior; another one in a space without a name whose axes
    are its own.

    Args:
        path: the file.
        arrays: the finished prediction.
        target: the target to write.
        affine: (4, 4) affine of the image over (X, Y, Z), or None.
        compress: whether the voxels are compressed (gzip).
    """
    stored = arrays.stored[target]
    dtype = wide(stored.dtype)
    with path.open("wb") as stream:
        lines = _header(arrays, stored.channels, dtype, affine, "gzip" if compress else "raw")
        stream.write(("\n".join(lines) + "\n\n").encode())
        with _packed(stream, compress) as write:
            for slab in slabs(arrays, target):
                # NRRD stores the first axis fastest: C order over (C, Z, Y, X).
                write(np.ascontiguousarray(slab, dtype=dtype.newbyteorder("<")).tobytes())


def _header(
    arrays: ZarrOutput, channels: int, dtype: np.dtype, affine: np.ndarray | None, encoding: str
) -> list[str]:
    ndim = len(arrays.shape)
    sizes = [*arrays.shape[::-1], *([channels] if channels > 1 else [])]
    if affine is not None and ndim == 3:
        steps = np.asarray(affine, dtype=np.float64)[:3, :3].T
        origin = np.asarray(affine)[:3, 3] + np.array(arrays.origin[::-1], dtype=np.float64) @ steps
        space = "space: right-anterior-superior"
    else:
        steps = np.diag(arrays.spacing[::-1])
        origin = np.array(first_voxel(arrays)[::-1])
        space = f"space dimension: {ndim}"
    directions = [_vector(step) for step in steps] + ["none"] * (channels > 1)
    lines = [
        "NRRD0005",
        "# written by volumen",
        f"type: {_TYPES[dtype.name]}",
        f"dimension: {len(sizes)}",
        space,
        f"sizes: {' '.join(map(str, sizes))}",
        f"space directions: {' '.join(directions)}",
        f"kinds: {' '.join(['domain'] * ndim + ['list'] * (channels > 1))}",
        "endian: little",
        f"encoding: {encoding}",
    ]
    if arrays.unit is not None:
        lines.append("space units: " + " ".join([f'"{_UNITS.get(arrays.unit, arrays.unit)}"'] * ndim))
    return [*lines, f"space origin: {_vector(origin)}"]


def _vector(values: Any) -> str:
    return "(" + ",".join(repr(float(value)) for value in values) + ")"


@contextmanager
def _packed(stream: Any, compress: bool) -> Iterator[Any]:
    """Yield a function that appends bytes to a file, compressed to one gzip member without a name or a time."""
    if not compress:
        yield stream.write
        return
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    yield lambda data: stream.write(packer.compress(data))
    stream.write(packer.flush())
