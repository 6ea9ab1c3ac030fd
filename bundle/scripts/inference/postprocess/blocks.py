"""Divides a volume into blocks of whole chunks, which passes process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

Region = tuple[slice, ...]


def block_counts(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return the number of blocks per axis."""
    return tuple(math.ceil(n / b) for n, b in zip(shape, block, strict=True))


def block_box(number: int, shape: Sequence[int], block: Sequence[int]) -> Region:
    """Return the region of the block with a number, cut at the volume's end; numbers are in C order."""
    index = [int(i) for i in np.unravel_index(number, block_counts(shape, block))]
    return tuple(slice(i * b, min((i + 1) * b, n)) for i, b, n in zip(index, block, shape, strict=True))


def neighbours(counts: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield (block, previous block along the axis, axis) for every pair of neighbours, as numbers."""
    steps = [math.prod(counts[axis + 1 :]) for axis in range(len(counts))]
    for number, index in enumerate(itertools.product(*map(range, counts))):
        for axis, step in enumerate(steps):
            if index[axis]:
                yield number, number - step, axis


def aligned_block(
    requested: Sequence[int], shape: Sequence[int], chunk: Sequence[int], most: int
) -> tuple[int, ...]:
    """Return the shape of a block: whole chunks, so that no two blocks write into the same chunk.

    Args:
        requested: voxels per axis, rounded up to chunks; (): chosen, the whole volume if it has at most `most` voxels.
        shape: shape of the volume.
        chunk: shape of a stored chunk.
        most: largest number of voxels of a chosen block, unless a single chunk has more.
    """
    if requested:
        return tuple(math.ceil(r / c) * c for r, c in zip(requested, chunk, strict=True))
    if math.prod(shape) <= most:
        return tuple(math.ceil(n / c) * c for n, c in zip(shape, chunk, strict=True))
    block = list(chunk)
    while True:
        # The shortest side grows, so that blocks stay compact.
        grow = [axis for axis in range(len(shape)) if block[axis] < shape[axis]]
        axis = min(grow, key=lambda a: block[a], default=None)
        if axis is None or math.prod(block) // block[axis] * (block[axis] + chunk[axis]) > most:
            return tuple(block)
        block[axis] += chunk[axis]
