"""Affinities between voxels: whether two belong to the same instance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def affinities(
    labels: np.ndarray, known: np.ndarray, offsets: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a voxel and the one at an offset have the same label above 0.

    a_o(p) = [label(p) = label(p + o) > 0] (Turaga et al., "Convolutional Networks Can Learn to Generate
    Affinity Graphs for Image Segmentation", 2010; long offsets: Lee et al. 2017).

    Args:
        labels: integer (C, *spatial), 2 or 3 spatial axes, instance numbers; two voxels are equal if all channels are.
        known: bool (*spatial), where the label is known.
        offsets: voxels per spatial axis, in the order of the axes.

    Returns:
        affinities bool (len(offsets), *spatial); valid bool (*spatial): the voxel and all its partners are
        known and inside the array.
    """
    shape = known.shape
    out = np.zeros((len(offsets), *shape), bool)
    valid = known.copy()
    for channel, offset in enumerate(offsets):
        here, there = overlap(shape, offset)
        partner = np.zeros(shape, bool)
        partner[here] = known[there]
        valid &= partner
        mine, theirs = labels[(slice(None), *here)], labels[(slice(None), *there)]
        out[channel][here] = (mine == theirs).all(axis=0) & (mine > 0).any(axis=0)
    return out & valid, valid


def overlap(shape: Sequence[int], offset: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return slices of the voxels that have a partner within the array, and of the partners."""
    here = tuple(slice(max(-step, 0), max(size - max(step, 0), 0)) for size, step in zip(shape, offset))
    there = tuple(slice(max(step, 0), max(size - max(-step, 0), 0)) for size, step in zip(shape, offset))
    return here, there
