"""Reads finished arrays slab by slab, and states where they lie, for the writers of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from volumen.data.space.units import factor
from volumen.inference.output.ome_zarr import ZarrOutput

PARTIAL = ".partial-"
"""Prefix of the name of an unfinished file; the suffix decides the format."""


def final_path(path: Path) -> Path:
    """Return the path that an unfinished file will have."""
    return path.with_name(path.name.removeprefix(PARTIAL))


def slabs(arrays: ZarrOutput, target: str) -> Iterator[np.ndarray]:
    """Yield the slabs of an array along the first spatial axis, channel by channel: (depth, *rest)."""
    depth = arrays.block_shape[0]
    rest = tuple(slice(0, n) for n in arrays.shape[1:])
    for channel in range(arrays.stored[target].channels):
        for start in range(0, arrays.shape[0], depth):
            box = (slice(start, min(start + depth, arrays.shape[0])), *rest)
            yield arrays.read(target, box)[channel]


def wide(dtype: np.dtype) -> np.dtype:
    """Return the type of a file's values: float32 for float16, which few formats and programs have."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def first_voxel(arrays: ZarrOutput) -> tuple[float, ...]:
    """Return the centre of the first voxel per axis, in the unit of the arrays."""
    return tuple(
        place + start * size
        for place, start, size in zip(arrays.place, arrays.origin, arrays.spacing, strict=True)
    )


def scale_to(arrays: ZarrOutput, unit: str) -> float | None:
    """Return the factor from the unit of the arrays to another one; None where theirs is not known."""
    return None if arrays.unit is None else factor(arrays.unit, unit)
