"""Joins the pieces of all blocks to fragments, and numbers these by the place of their first bottoms."""

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
    """Fragments of a volume, numbered from 1 in the order of their first bottoms.

    Args:
        offsets: first piece of each block, and their count, int64 (blocks + 1,).
        number: fragment of each piece, uint32 (pieces,).
        sizes: voxels of each fragment, int64 (fragments,).
        lowest: the lowest height of each fragment, int64 (fragments,).
        seeds: peaks in each fragment, int64 (fragments,).
        bottoms: index in the volume of the first bottom of each fragment, int64 (fragments,), ascending.
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
    """Join the pieces of all blocks; memory holds about 40 bytes per piece.

    Args:
        load: returns the arrays of `Pieces` and those of `shell_of` of a block.
        shape: shape of the volume.
        block: shape of a block.
    """
    blocks = math.prod(block_counts(shape, block))
    offsets = np.zeros(blocks + 1, np.int64)
    parts, leaving, places = [], [], []
    for number in range(blocks):
        found = load(number, "ends", "bottoms")
        offsets[number + 1] = offsets[number] + len(found["ends"])
        parts.append(found["bottoms"])
        out = np.flatnonzero(found["ends"][:, 1] == 0)
        leaving.append(out + offsets[number])
        places.append(found["ends"][out, 0])
    least = np.concatenate(parts)
    del parts
    root = _following(load, offsets, np.concatenate(leaving), np.concatenate(places), shape, block)
    del leaving, places
    np.minimum.at(least, root, least.copy())
    ends = np.flatnonzero(root == np.arange(len(root), dtype=np.uint32))
    ends = ends[np.argsort(least[ends], kind="stable")]
    bottoms = least[ends]
    del least
    of_end = np.zeros(len(root), np.uint32)
    of_end[ends] = np.arange(1, len(ends) + 1)
    fragment = of_end[root]
    del root, of_end
    sizes, seeds = np.zeros((2, len(ends)), np.int64)
    lowest = np.full(len(ends), np.iinfo(np.int64).max)
    for number in range(blocks):
        found = load(number, "sizes", "lowest", "seeds")
        own = fragment[offsets[number] : offsets[number + 1]].astype(np.int64) - 1
        np.add.at(sizes, own, found["sizes"])
        np.add.at(seeds, own, found["seeds"])
        np.minimum.at(lowest, own, found["lowest"])
    return Fragments(offsets, fragment, sizes, lowest, seeds, bottoms)


def _following(
    load: Load,
    offsets: np.ndarray,
    leaving: np.ndarray,
    places: np.ndarray,
    shape: Sequence[int],
    block: Sequence[int],
) -> np.ndarray:
    """Return the piece in which the way from each piece ends, uint32 (pieces,).

    Args:
        load, shape, block: see `join_pieces`.
        offsets: first piece of each block, and their count.
        leaving: pieces whose last step leads to another block.
        places: indices in the volume to which it leads.
    """
    counts = block_counts(shape, block)
    root = np.arange(offsets[-1], dtype=np.uint32)
    where = np.stack(np.unravel_index(places, tuple(shape)), axis=1)
    owner = np.ravel_multi_index(tuple((where // np.array(block)).T), counts)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(len(offsets)))
    for number in range(len(offsets) - 1):
        chosen = order[starts[number] : starts[number + 1]]
        if len(chosen):
            local = _on_shell(load(number), where[chosen], block_box(number, shape, block))
            root[leaving[chosen]] = offsets[number] + local.astype(np.int64) - 1
    return _ends_of_chains(root)


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
