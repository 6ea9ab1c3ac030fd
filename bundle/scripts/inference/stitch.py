"""Instances of volumes larger than memory: segmented block by block with context, joined by overlap.

Two neighbouring blocks both segment the two planes of voxels at their common face, one with its own voxels, the
other with its halo. An instance of one is the same as one of the other where each holds more than half of the
voxels that the other has there. Such pairs are joined by union-find. One instance can therefore have at most one
partner at a face: an error in one block cannot glue together what the other kept apart.

Every block leaves a small file with its counts and planes when it is done, so an interrupted run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.inference.instances import renumber
from scripts.inference.postprocess import Read, Region, Write, blocks_of, join

Segment = Callable[[Region], np.ndarray]


@dataclass(frozen=True)
class _Block:
    """What is kept of a segmented block: sizes of its instances, and instances on both planes of each face."""

    sizes: np.ndarray
    planes: dict[str, np.ndarray]


def label_volume(
    segment: Segment,
    local: tuple[Read, Write],
    write: Write,
    shape: tuple[int, ...],
    block: tuple[int, ...],
    halo: Sequence[int],
    folder: Path,
    *,
    min_size: int = 0,
    workers: int = 1,
) -> int:
    """Segment a volume block by block and number its instances from 1 without a gap.

    With a single block the result is that of the whole volume.

    Args:
        segment: gives the instances of a region, 0 for none.
        local: reader and writer of a working array of the volume's shape, uint32.
        write: takes the final numbers of a region.
        shape: shape of the volume.
        block: shape of a block.
        halo: context per axis, at least 1.
        folder: for the files of finished blocks.
        min_size: instances of fewer voxels are left out.
        workers: blocks at a time.

    Returns:
        The number of instances.
    """
    folder.mkdir(parents=True, exist_ok=True)
    boxes = dict(blocks_of(shape, block))
    read_local, write_local = local

    def work(item: tuple[tuple[int, ...], Region]) -> None:
        index, box = item
        path = _file(folder, index)
        if not path.exists():
            labels, done = _segment_block(segment, box, shape, halo)
            write_local(box, labels)
            _save(path, done)

    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="instances") as pool:
        list(pool.map(work, boxes.items()))
        offsets, numbers = _join_blocks(folder, boxes, len(shape), min_size)

        def finish(item: tuple[tuple[int, ...], Region]) -> None:
            index, box = item
            start, stop = offsets[index]
            table = np.concatenate([[0], numbers[start:stop]]).astype(np.uint32)
            write(box, table[read_local(box)])

        list(pool.map(finish, boxes.items()))
    return int(numbers.max(initial=0))


def _segment_block(
    segment: Segment, box: Region, shape: tuple[int, ...], halo: Sequence[int]
) -> tuple[np.ndarray, _Block]:
    outer = tuple(
        slice(max(part.start - h, 0), min(part.stop + h, n))
        for part, h, n in zip(box, halo, shape, strict=True)
    )
    inner = tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))
    found = segment(outer)
    labels, count = renumber(found[inner])
    # Numbers of the inner part for the whole: 0 for instances that only the halo holds.
    own = np.zeros(int(found.max(initial=0)) + 1, np.uint32)
    own[found[inner]] = labels
    planes = {}
    for axis, part in enumerate(box):
        for side, at in (("low", part.start), ("high", part.stop)):
            if 0 < at < shape[axis]:
                pair = list(inner)
                pair[axis] = slice(at - 1 - outer[axis].start, at + 1 - outer[axis].start)
                planes[f"{side}{axis}"] = own[found[tuple(pair)]]
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    return labels, _Block(sizes, planes)


def _join_blocks(
    folder: Path, boxes: dict[tuple[int, ...], Region], ndim: int, min_size: int
) -> tuple[dict[tuple[int, ...], tuple[int, int]], np.ndarray]:
    """Return each block's range of numbers, and the final number of each (0 where it is too small)."""
    offsets, sizes, total = {}, [], 0
    for index in boxes:
        with np.load(_file(folder, index)) as content:
            sizes.append(content["sizes"])
        offsets[index] = (total, total + len(sizes[-1]))
        total += len(sizes[-1])
    pairs = []
    for index in boxes:
        for axis in range(ndim):
            before = (*index[:axis], index[axis] - 1, *index[axis + 1 :])
            if before not in boxes:
                continue
            with np.load(_file(folder, before)) as one, np.load(_file(folder, index)) as other:
                found = _partners(one[f"high{axis}"], other[f"low{axis}"])
            pairs.append(found + np.array([[offsets[before][0], offsets[index][0]]]))
    root = join(total, pairs) if total else np.zeros(0, np.int64)
    size = np.bincount(root, weights=np.concatenate([*sizes, np.zeros(0)]), minlength=total)
    kept = np.flatnonzero((size > 0) & (size >= min_size))
    final = np.zeros(total, np.int64)
    final[kept] = np.arange(1, len(kept) + 1)
    return offsets, final[root]


def _partners(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return pairs, counted from 0, of which each holds more than half of the other's voxels: (pairs, 2)."""
    a, b = one.reshape(-1).astype(np.int64), other.reshape(-1).astype(np.int64)
    of_a, of_b = np.bincount(a), np.bincount(b)
    both = (a > 0) & (b > 0)
    pairs, shared = np.unique(np.stack([a[both], b[both]], axis=1), axis=0, return_counts=True)
    good = (2 * shared > of_a[pairs[:, 0]]) & (2 * shared > of_b[pairs[:, 1]])
    return pairs[good] - 1


def _file(folder: Path, index: tuple[int, ...]) -> Path:
    return folder / f"block_{'_'.join(map(str, index))}.npz"


def _save(path: Path, block: _Block) -> None:
    """Write a block's file so that it is there whole or not at all."""
    partial = path.with_suffix(".npz.partial")
    with partial.open("wb") as stream:
        arrays: dict[str, np.ndarray] = {"sizes": block.sizes, **block.planes}
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
