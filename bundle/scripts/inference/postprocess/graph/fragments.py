"""Fragments of a block: the voxels from which steepest descent leads to the same bottom.

A bottom may lie in another block. So a block is divided into pieces, each of which ends at a bottom or steps into
another block. `volumen.inference.postprocess.graph.links` joins pieces to fragments. As every step depends on a bounded
surrounding alone, the basins of a volume are the same for all divisions into blocks.

Most basins have no seed. Within a block they are flooded at once, see `contracting`, so that a fragment is one basin or
several. Which ones depends on the blocks; the regions that flooding makes of the fragments do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volumen.derived.distance_window import three_axes
from volumen.inference.postprocess.graph import kernels
from volumen.inference.postprocess.graph.contracting import (
    contracted_numbers,
    least_of,
    relabel,
    roots_of,
    sums_of,
)
from volumen.inference.postprocess.graph.edges import three_links
from volumen.inference.postprocess.graph.landscape import Landscape

NO_PLACE = np.iinfo(np.int64).max
"""Place of the bottom of a piece without one."""

Region = tuple[slice, ...]


@dataclass(frozen=True)
class Pieces:
    """Pieces of a block, numbered from 1.

    Args:
        labels: uint32 (*space), 0 for none.
        ends: int64 (pieces, 2): index in the volume of the bottom, or of the voxel in another block to which the
            piece's last step leads; 1 for a bottom, 0 for a step.
        sizes: int64 (pieces,), voxels.
        lowest: int64 (pieces,), the lowest height of each piece.
        seeds: int64 (pieces,), peaks of the depth in each piece.
        bottoms: int64 (pieces,), index in the volume of the first bottom in each piece, `NO_PLACE` for none.
    """

    labels: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    lowest: np.ndarray
    seeds: np.ndarray
    bottoms: np.ndarray


def pieces_of(landscape: Landscape, inner: Region, shape: Sequence[int], first: Sequence[int]) -> Pieces:
    """Return the pieces of a block, after those without a seed were flooded that have all neighbours in the block.

    Args:
        landscape: the block and its surroundings.
        inner: the block as a part of the landscape.
        shape: shape of the volume.
        first: place of the landscape in the volume.
    """
    volume = three_axes(landscape.wall.shape)
    inside, free, depth, height = (
        np.ascontiguousarray(part).reshape(volume)
        for part in (landscape.inside, landscape.free, landscape.depth, landscape.height)
    )
    pad = 3 - len(inner)
    region = np.array([(0, 1)] * pad + [(part.start, part.stop) for part in inner], np.int64)
    peak = np.zeros(volume, bool)
    kernels.find_peaks(free, depth, region, peak)
    step = np.full(volume, kernels.NONE, np.uint8)
    links = three_links(landscape.links, volume)
    kernels.descend(inside, height, links, region, step)
    count = kernels.count_ends(step, region)
    labels = np.zeros([stop - start for start, stop in region], np.uint32)
    ends = np.zeros((count, 2), np.int64)
    sizes, lowest, seeds = np.zeros((3, count), np.int64)
    space, corner = np.array(three_axes(shape), np.int64), np.array([0] * pad + list(first), np.int64)
    kernels.number_pieces(step, peak, height, region, space, corner, labels, ends, sizes, lowest, seeds)
    root = roots_of(labels, height, links, region, corner, space, seeds)
    numbers, roots = contracted_numbers(root)
    relabel(labels, numbers)
    group, groups = numbers[1:].astype(np.int64) - 1, len(roots)
    return Pieces(
        labels.reshape(labels.shape[pad:]),
        ends[roots - 1],
        sums_of(sizes, group, groups),
        least_of(lowest, group, groups),
        sums_of(seeds, group, groups),
        least_of(np.where(ends[:, 1] == 1, ends[:, 0], NO_PLACE), group, groups),
    )
