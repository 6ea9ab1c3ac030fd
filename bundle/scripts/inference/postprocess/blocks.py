"""Blocks of a volume that passes go over, whole chunks each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

Region = tuple[slice, ...]


def block_counts(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return blocks per axis."""
    return tuple(math.ceil(n / b) for n, b in zip(shape, block, strict=True))


def block_box(number: int, shape: Sequence[int], block: Sequence[int]) -> Region:
    """Return the place of a block, cut at the volume's end, by its place in the order of all, the last axis fastest."""
    index = [int(i) for i in np.unravel_index(number, block_counts(shape, block))]
    return tuple(slice(i * b, min((i + 1) * b, n)) for i, b, n in zip(index, block, shape, strict=True))


def neighbours(counts: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield (block, the one before it on an axis, axis), blocks by their place in the order of all."""
    steps = [math.prod(counts[axis + 1 :]) for axis in range(len(counts))]
    for number, index in enumerate(itertools.product(*map(range, counts))):
        for axis, step in enumerate(steps):
            if index[axis]:
                yield number, number - step, axis


def aligned_block(
    wanted: Sequence[int], shape: Sequence[int], chunk: Sequence[int], most: int
) -> tuple[int, ...]:
    """Return voxels per axis to segment at once: whole chunks, so that no two blocks write one.

    Args:
        wanted: voxels per axis, rounded up to chunks; () to choose, the whole volume if it is not too large.
        shape: shape of the volume.
        chunk: shape of a stored chunk.
        most: voxels of a chosen block, unless a single chunk has more.
    """
    if wanted:
        return tuple(math.ceil(w / c) * c for w, c in zip(wanted, chunk, strict=True))
    if math.prod(shape) <= most:
        return tuple(math.ceil(n / c) * c for n, c in zip(shape, chunk, strict=True))
    block = list(chunk)
    while True:
        # The axis on which the block is smallest for its share of the volume, so that blocks stay compact.
        grow = [axis for axis in range(len(shape)) if block[axis] < shape[axis]]
        axis = min(grow, key=lambda a: block[a], default=None)
        if axis is None or math.prod(block) // block[axis] * (block[axis] + chunk[axis]) > most:
            return tuple(block)
        block[axis] += chunk[axis]
