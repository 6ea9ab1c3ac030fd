"""The blocks that validation scores: the whole validation part, or an unbiased random sample of it with weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from volumen.data.index.label_counts import (
    CellCounts,
    CountRequest,
    LabelCounter,
    LabelReader,
    count_case,
    default_threads,
)
from volumen.data.index.patch_index import PatchLocation
from volumen.utils.boxes import Box, whole_box
from volumen.utils.terminal.progress import grow, hidden

# The outputs of all heads for a block are in memory at the same time: 16 MiB per channel.
MAX_BLOCK_VOXELS = 1 << 22
# If the limit allows fewer blocks of the largest size, smaller blocks represent the validation part better.
MIN_DRAWN_BLOCKS = 4


@dataclass(frozen=True)
class BlockTable:
    """N blocks as arrays with one row per block (D axes, T targets).

    Args:
        case: (N,) index into the cases.
        start: (N, D) first voxel.
        size: (N, D) voxels per axis.
        known: (N, T) known voxels of each target.
        labelled: (N, T) known voxels whose label is not 0.
    """

    case: np.ndarray
    start: np.ndarray
    size: np.ndarray
    known: np.ndarray
    labelled: np.ndarray

    def __len__(self) -> int:
        return len(self.case)

    def rows(self, chosen: np.ndarray) -> BlockTable:
        """Return some of the blocks, by row numbers or boolean flags."""
        return BlockTable(
            self.case[chosen],
            self.start[chosen],
            self.size[chosen],
            self.known[chosen],
            self.labelled[chosen],
        )

    def location(self, row: int, shape: Sequence[int]) -> PatchLocation:
        """Return the location of a block in a volume of that shape; the voxels around it may be read as halo."""
        start, size = (
            tuple(int(value) for value in row_values[row]) for row_values in (self.start, self.size)
        )
        return PatchLocation(int(self.case[row]), start, size, whole_box(shape))


@dataclass(frozen=True)
class Draw:
    """Blocks to score: rows of a table, (n,), and the number of blocks that each represents, float64 (n,)."""

    rows: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def block_size(patch_size: Sequence[int], most_windows: int | None = None) -> tuple[int, ...]:
    """Return the largest block size for a patch: two patches along as many axes, from the last, as memory allows.

    Args:
        patch_size: voxels per axis.
        most_windows: largest number of windows in all blocks together. Blocks are smaller if fewer than
            `MIN_DRAWN_BLOCKS` blocks of the largest size have that many windows.
    """
    size = [int(extent) for extent in patch_size]
    for axis in reversed(range(len(size))):
        wide = [2 * extent if other == axis else extent for other, extent in enumerate(size)]
        few = most_windows is not None and MIN_DRAWN_BLOCKS * window_count(wide, patch_size) > most_windows
        if math.prod(wide) <= MAX_BLOCK_VOXELS and not few:
            size = wide
    return tuple(size)


def fitting_size(
    boxes: Mapping[str, Sequence[Box]], patch_size: Sequence[int], most_windows: int | None
) -> tuple[int, ...]:
    """Return the largest block size for regions: as large as memory allows if all blocks are within the limit."""
    largest = block_size(patch_size)
    if most_windows is None or int(part_windows(boxes, patch_size, largest).sum()) <= most_windows:
        return largest
    return block_size(patch_size, most_windows)


def block_edges(box: Box, largest: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Return ascending coordinates per axis that cut a box into blocks of nearly equal size, at most `largest`."""
    edges = []
    for (start, stop), most in zip(box, largest, strict=True):
        pieces = max(1, math.ceil((stop - start) / most))
        edges.append(start + (stop - start) * np.arange(pieces + 1, dtype=np.int64) // pieces)
    return tuple(edges)


def window_count(size: Sequence[int], patch_size: Sequence[int]) -> int:
    """Return the number of windows in a block, with an overlap of one half."""
    return int(window_counts(np.asarray(size)[None], patch_size)[0])


def window_counts(sizes: np.ndarray, patch_size: Sequence[int]) -> np.ndarray:
    """Return `window_count` of many blocks: sizes (N, D) to int64 (N,)."""
    patch = np.asarray(patch_size, dtype=np.int64)
    step = np.maximum(1, np.round(patch / 2).astype(np.int64))
    over = np.maximum(0, np.asarray(sizes, dtype=np.int64) - patch)
    return (1 + -(-over // step)).prod(axis=1)


def part_windows(
    boxes: Mapping[str, Sequence[Box]], patch_size: Sequence[int], largest: Sequence[int]
) -> np.ndarray:
    """Return the number of windows of each block of regions, without reading labels: int64 (N,)."""
    sizes = [_grid(block_edges(box, largest))[1] for parts in boxes.values() for box in parts]
    return np.concatenate([window_counts(size, patch_size) for size in sizes] or [np.zeros(0, np.int64)])


def find_blocks(
    cases: Sequence[Any],
    boxes: Mapping[str, Sequence[Box]],
    sizes: Sequence[Sequence[int]],
    targets: Sequence[str],
    *,
    ignore_labels: Mapping[str, int | None] | None = None,
    objects_only: bool = False,
    progress: bool = True,
) -> list[BlockTable]:
    """Cut regions into blocks and count known and labelled voxels in each, reading each stored label chunk once.

    Args:
        cases: opened cases (`OpenCase`).
        boxes: regions by case name.
        sizes: for each way to cut the regions, the largest block in voxels per axis.
        targets: labelled targets.
        ignore_labels: label value that means unknown, by target.
        objects_only: only voxels with a label other than 0 count as known (`compute_loss_on_labeled_only`).
        progress: show a progress bar.

    Returns:
        The blocks of each way to cut the regions.
    """
    from tqdm import tqdm

    ignore = ignore_labels or {}
    parts: list[list[BlockTable]] = [[] for _ in sizes]
    with tqdm(total=0, desc="validation part", unit="block", disable=hidden(progress), leave=False) as bar:
        for number, case in enumerate(cases):
            grids = [block_edges(box, size) for size in sizes for box in boxes.get(case.name, ())]
            if not grids:
                continue
            counters = {
                target: LabelCounter(
                    LabelReader(case.labels[target], case.masks.get(target), _request(case, target, ignore)),
                    grids,
                )
                for target in targets
                if target in case.labels
            }
            count_case(counters, default_threads(), partial(grow, bar), bar.update)
            for place, edges in enumerate(grids):
                counts = [
                    counters[target].counts[place] if target in counters else None for target in targets
                ]
                way = place * len(sizes) // len(grids)
                parts[way].append(_table(number, edges, counts, objects_only))
    return [_joined(tables, len(size), len(targets)) for tables, size in zip(parts, sizes)]


def _table(
    case: int, edges: Sequence[np.ndarray], counts: Sequence[CellCounts | None], objects_only: bool
) -> BlockTable:
    """Return the blocks of one region; the counts of a target are None if the case lacks its label."""
    start, size = _grid(edges)
    known = np.zeros((len(start), len(counts)), np.uint32)
    labelled = np.zeros_like(known)
    for column, found in enumerate(counts):
        if found is None:
            continue
        assert found.foreground is not None
        labelled[:, column] = found.foreground.ravel()
        every = size.prod(axis=1) if found.known is None else found.known.ravel()
        known[:, column] = labelled[:, column] if objects_only else every
    return BlockTable(np.full(len(start), case, np.int32), start, size, known, labelled)


def _joined(tables: Sequence[BlockTable], ndim: int, targets: int) -> BlockTable:
    nowhere, nothing = np.zeros((0, ndim), np.int32), np.zeros((0, targets), np.uint32)
    empty = BlockTable(np.zeros(0, np.int32), nowhere, nowhere, nothing, nothing)
    return BlockTable(
        *(
            np.concatenate([getattr(table, name) for table in (empty, *tables)])
            for name in BlockTable.__dataclass_fields__
        )
    )


def _request(case: Any, target: str, ignore: Mapping[str, int | None]) -> CountRequest:
    # Without a mask and an ignore label every voxel is known, so nothing must be counted.
    limited = target in case.masks or ignore.get(target) is not None
    return CountRequest(ignore=ignore.get(target), known=limited, foreground=True)


def _grid(edges: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return start and size of every cell of a grid, in C order: int32 (N, D) each."""
    shape, ndim = tuple(len(axis) - 1 for axis in edges), len(edges)
    start, size = np.empty((2, *shape, ndim), np.int32)
    for axis, values in enumerate(edges):
        along = [-1 if other == axis else 1 for other in range(ndim)]
        start[..., axis] = values[:-1].reshape(along)
        size[..., axis] = np.diff(values).reshape(along)
    return start.reshape(-1, ndim), size.reshape(-1, ndim)


def draw_blocks(table: BlockTable, windows: np.ndarray, most: int | None, seed: int = 0) -> Draw:
    """Draw random blocks up to a number of windows, each with the number of blocks that it represents.

    The blocks of a volume are grouped by the targets that are labelled in them; background is a group too. From each
    group a simple random sample is drawn, so that rare labels occur. Each of n blocks drawn out of N has the weight
    N / n. Weighted sums are then unbiased estimates of the sums over the whole volume (Horvitz and Thompson 1952). If
    there are more volumes than the limit allows, a random subset of them is drawn, each with all of its groups.

    Args:
        table: blocks, each with at least one known voxel.
        windows: (N,) number of windows of each block.
        most: largest number of windows of all drawn blocks; None: all blocks. At least one block of each group of one
            volume is drawn.
        seed: seed of the draw.

    Returns:
        The blocks; the first one has labels if any block has.
    """
    if most is None or int(windows.sum()) <= most:
        order = np.argsort(~(table.labelled > 0).any(axis=1), kind="stable")
        return Draw(order, np.ones(len(order)))
    # One group number per volume and set of labelled targets; background is first.
    bits = np.left_shift(1, np.arange(table.labelled.shape[1], dtype=np.int64))
    kinds = ((table.labelled > 0) * bits).sum(axis=1)
    keys, group = np.unique(table.case.astype(np.int64) * (kinds.max() + 1) + kinds, return_inverse=True)
    volumes = keys // (kinds.max() + 1)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(table))
    shuffled = shuffled[np.argsort(group[shuffled], kind="stable")]
    sizes = np.bincount(group)
    queues = np.split(shuffled, np.cumsum(sizes)[:-1])
    taken = _draw_in_turn(volumes, queues, windows, most, rng)
    drawn = np.bincount(group[taken], minlength=len(sizes))
    return Draw(taken, sizes[group[taken]] / drawn[group[taken]])


def _draw_in_turn(
    volume_of: np.ndarray,
    queues: Sequence[np.ndarray],
    windows: np.ndarray,
    most: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Take blocks in turn from every group of every volume, until the number of windows reaches the limit."""
    volumes = rng.permutation(np.unique(volume_of))
    # Groups with labels first.
    of_volume = {
        int(volume): [int(g) for g in np.flatnonzero(volume_of == volume)[::-1]] for volume in volumes
    }
    taken: list[int] = []
    total = 0
    for turn in itertools.count():
        for volume in volumes:
            for number in of_volume[int(volume)]:
                if turn and total >= most:
                    return np.array(taken)
                if turn < len(queues[number]):
                    taken.append(int(queues[number][turn]))
                    total += int(windows[taken[-1]])
            # The first round takes all groups of a volume: without its background, false positives would not count.
            if total >= most:
                return np.array(taken)
    raise AssertionError("unreachable")


def cut(box: Box, largest: Sequence[int]) -> list[Box]:
    """Cut a box into blocks of nearly equal size, none larger than `largest` along any axis."""
    spans = [list(itertools.pairwise(axis.tolist())) for axis in block_edges(box, largest)]
    return [tuple(block) for block in itertools.product(*spans)]
