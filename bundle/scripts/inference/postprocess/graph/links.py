"""Joins the pieces of all blocks to fragments, and numbers these by the place of their bottoms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from volumen.inference.postprocess.blocks import Region, block_box, block_counts

Load = Callable[..., Mapping[str, np.ndarray]]
"""Returns arrays of a block's file from the number of the block and the names of the arrays."""


@dataclass(frozen=True)
class Fragments:
    """Fragments of a volume, numbered from 1 in the order of their bottoms.

    Args:
        offsets: first piece of each block, and their count, int64 (blocks + 1,).
        number: fragment of each piece, uint32 (pieces,).
        sizes: voxels of each fragment, int64 (fragments,).
        lowest: the lowest height of each fragment, int64 (fragments,).
        seeds: peaks in each fragment, int64 (fragments,).
        bottoms: index in the volume of the bottom of each fragment, int64 (fragments,), ascending.
    """

    offsets: np.ndarray
    number: np.ndarray
    sizes: np.ndarray
    lowest: np.ndarray
    seeds: np.ndarray
    bottoms: np.ndarray


def shell_of(labels: np.ndarray, box: Region, shape: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the planes of a block towards other blocks: `low0` and `high0` for axis 0, and so on."""
    planes = {}
    for axis, (part, n) in enumerate(zip(box, shape, strict=True)):
        if part.start > 0:
            planes[f"low{axis}"] = np.take(labels, 0, axis)
        if part.stop < n:
            planes[f"high{axis}"] = np.take(labels, -1, axis)
    return planes


def join_pieces(load: Load, shape: Sequence[int], block: Sequence[int]) -> Fragments:
    """Join the pieces of all blocks; memory holds about 50 bytes per piece.

    Args:
        load: returns the arrays `ends`, `sizes`, `lowest`, `seeds` and those of `shell_of` of a block.
        shape: shape of the volume.
        block: shape of a block.
    """
    counts = block_counts(shape, block)
    blocks = math.prod(counts)
    found = [load(number, "ends", "sizes", "lowest", "seeds") for number in range(blocks)]
    offsets = np.concatenate([[0], np.cumsum([len(part["sizes"]) for part in found])]).astype(np.int64)
    ends, sizes, lowest, seeds = (
        np.concatenate([part[name] for part in found]) for name in ("ends", "sizes", "lowest", "seeds")
    )
    del found
    root = np.arange(len(ends))
    leaving = np.flatnonzero(ends[:, 1] == 0)
    places = np.stack(np.unravel_index(ends[leaving, 0], tuple(shape)), axis=1)
    owner = np.ravel_multi_index(tuple((places // np.array(block)).T), counts)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(blocks + 1))
    for number in range(blocks):
        chosen = order[starts[number] : starts[number + 1]]
        if len(chosen):
            box = block_box(number, shape, block)
            local = _on_shell(load(number), places[chosen], box)
            root[leaving[chosen]] = offsets[number] + local.astype(np.int64) - 1
    root = _ends_of_chains(root)
    bottoms = np.flatnonzero(ends[:, 1] == 1)
    bottoms = bottoms[np.argsort(ends[bottoms, 0], kind="stable")]
    of_bottom = np.zeros(len(ends), np.uint32)
    of_bottom[bottoms] = np.arange(1, len(bottoms) + 1)
    fragment = of_bottom[root]
    total, inner = (
        np.bincount(fragment, weights=values, minlength=len(bottoms) + 1)[1:].astype(np.int64)
        for values in (sizes, seeds)
    )
    least = np.full(len(bottoms) + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, fragment, lowest)
    return Fragments(offsets, fragment, total, least[1:], inner, ends[bottoms, 0])


def _on_shell(planes: Mapping[str, np.ndarray], places: np.ndarray, box: Region) -> np.ndarray:
    """Return the numbers at voxels of a block's outermost planes.

    Args:
        planes: see `shell_of`.
        places: (n, axes), in the volume.
        box: the block.
    """
    found = np.zeros(len(places), np.uint32)
    local = places - np.array([part.start for part in box])
    for axis, part in enumerate(box):
        others = np.delete(local, axis, axis=1)
        for side, at in (("low", 0), ("high", part.stop - part.start - 1)):
            there = (local[:, axis] == at) & (found == 0)
            if f"{side}{axis}" in planes and there.any():
                found[there] = planes[f"{side}{axis}"][tuple(others[there].T)]
    return found


def _ends_of_chains(following: np.ndarray) -> np.ndarray:
    """Return where each chain ends: the number that follows itself."""
    while True:
        further = following[following]
        if np.array_equal(further, following):
            return following
        following = further
