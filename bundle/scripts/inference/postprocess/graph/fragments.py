"""Fragments of a block: the voxels from which steepest ascent leads to the same peak, and the walls around them.

A peak may lie in another block. So a block is divided into pieces, each of which ends at a peak or steps into another
block. `volumen.inference.postprocess.graph.links` joins pieces to fragments. As every step depends on a bounded
surrounding alone, the fragments of a volume are the same for all divisions into blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volumen.derived.distance_window import three_axes
from volumen.inference.postprocess.graph import kernels
from volumen.inference.postprocess.graph.landscape import CERTAIN, Landscape

ROUNDS = 16
"""Voxels that fragments grow into walls at most; voxels deeper in a wall belong to no instance."""
RISING = 8
"""Rounds in which the highest wall that is entered rises from the threshold to a certain wall."""

Region = tuple[slice, ...]


@dataclass(frozen=True)
class Pieces:
    """Pieces of a block, numbered from 1.

    Args:
        labels: uint32 (*space), 0 for none.
        ends: int64 (pieces, 2): index in the volume of the peak, or of the voxel in another block to which the piece's
            last step leads; 1 for a peak, 0 for a step.
        sizes: int64 (pieces,), voxels.
        lowest: int64 (pieces,), the lowest value of the basin in each piece.
    """

    labels: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    lowest: np.ndarray


def pieces_of(
    landscape: Landscape, threshold: int, inner: Region, shape: Sequence[int], first: Sequence[int]
) -> Pieces:
    """Return the pieces of a block.

    Args:
        landscape: the block and its surroundings.
        threshold: the lowest wall that separates.
        inner: the block as a part of the landscape.
        shape: shape of the volume.
        first: place of the landscape in the volume.
    """
    volume = three_axes(landscape.wall.shape)
    wall, inside, free, height = (
        np.ascontiguousarray(part).reshape(volume)
        for part in (landscape.wall, landscape.inside, landscape.free, landscape.height)
    )
    pad = 3 - len(inner)
    region = np.array([(0, 1)] * pad + [(part.start, part.stop) for part in inner], np.int64)
    step = np.full(volume, kernels.NONE, np.uint8)
    kernels.ascend(free, height, region, step)
    links = np.zeros((0, 0, 0, 0), np.uint16)
    if landscape.links is not None:
        links = np.full((3, *volume), CERTAIN, np.uint16)
        links[pad:] = landscape.links.reshape(-1, *volume)
    kernels.grow(free, inside, wall, links, rising_levels(threshold), np.empty(volume, np.uint8), step)
    count = kernels.count_ends(step, region)
    labels = np.zeros([stop - start for start, stop in region], np.uint32)
    ends = np.zeros((count, 2), np.int64)
    sizes, lowest = np.zeros((2, count), np.int64)
    basin = wall if landscape.basin is None else np.ascontiguousarray(landscape.basin).reshape(volume)
    kernels.number_pieces(
        step,
        basin,
        region,
        np.array(three_axes(shape), np.int64),
        np.array([0] * pad + list(first), np.int64),
        labels,
        ends,
        sizes,
        lowest,
    )
    return Pieces(labels.reshape(labels.shape[pad:]), ends, sizes, lowest)


def rising_levels(threshold: int) -> np.ndarray:
    """Return the highest wall that each round of growth enters, uint16 (`ROUNDS`,)."""
    rising = np.linspace(threshold, CERTAIN, RISING + 1)[1:]
    return np.rint(np.concatenate([rising, np.full(ROUNDS - RISING, CERTAIN)])).astype(np.uint16)
