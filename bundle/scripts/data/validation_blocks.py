"""The blocks that validation scores: all of the validation part, or an unbiased draw of them with weights."""

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
from volumen.utils.progress import grow, hidden

# A block's outputs are held for all heads at once: 16 MiB a channel.
MOST_BLOCK_VOXELS = 1 << 22
# With a limit that holds fewer blocks of two patches along every axis, smaller blocks spread it better.
FEWEST_DRAWN = 4


@dataclass(frozen=True)
class BlockTable:
    """Blocks of N, as arrays with one row per block (D axes, T targets).

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
        """Return some of the blocks, by numbers or flags."""
        return BlockTable(
            self.case[chosen],
            self.start[chosen],
            self.size[chosen],
            self.known[chosen],
            self.labelled[chosen],
        )

    def location(self, row: int, shape: Sequence[int]) -> PatchLocation:
        """Return a block of a volume of that shape; what lies around it in the volume may be read as halo."""
        start, size = (
            tuple(int(value) for value in row_values[row]) for row_values in (self.start, self.size)
        )
        return PatchLocation(int(self.case[row]), start, size, whole_box(shape))


@dataclass(frozen=True)
class Draw:
    """Blocks to score: (n,) rows of a table, and how many blocks of it each stands for, float64 (n,)."""

    rows: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def block_size(patch_size: Sequence[int], most_windows: int | None = None) -> tuple[int, ...]:
    """Return the largest block for a patch: two patches along as many axes, from the last, as memory allows.

    Args:
        patch_size: voxels per axis.
        most_windows: how many windows all blocks together may hold. Blocks are smaller where fewer than `FEWEST_DRAWN`
            of the largest hold as many.
    """
    size = [int(extent) for extent in patch_size]
    for axis in reversed(range(len(size))):
        wide = [2 * extent if other == axis else extent for other, extent in enumerate(size)]
        few = most_windows is not None and FEWEST_DRAWN * window_count(wide, patch_size) > most_windows
        if math.prod(wide) <= MOST_BLOCK_VOXELS and not few:
            size = wide
    return tuple(size)


def fitting_size(
    boxes: Mapping[str, Sequence[Box]], patch_size: Sequence[int], most_windows: int | None
) -> tuple[int, ...]:
    """Return the largest block for regions and a limit: as large as memory allows where all of them are within it."""
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
    """Return how many windows, each half over the next, a block takes."""
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
    """Return the windows of each block of regions, without reading labels: int64 (N,)."""
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
    """Cut regions into blocks and count what is known and labelled in each, reading each stored label chunk once.

    Args:
        cases: opened cases (`OpenCase`).
        boxes: regions by case name.
        sizes: largest block, voxels per axis, of each way to cut them.
        targets: labelled targets.
        ignore_labels: label value that means unknown, by target.
        objects_only: only voxels with a label other than 0 count as known (`compute_loss_on_labeled_only`).
        progress: show a progress bar.

    Returns:
        The blocks of each way.
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
    """Return the blocks of one region, from the counts of each target; None where the case lacks its label."""
    start, size = _grid(edges)
    known = np.zeros((len(start), len(counts)), np.int64)
    labelled = np.zeros_like(known)
    for column, found in enumerate(counts):
        if found is None:
            continue
        assert found.foreground is not None
        labelled[:, column] = found.foreground.ravel()
        every = size.prod(axis=1) if found.known is None else found.known.ravel()
        known[:, column] = labelled[:, column] if objects_only else every
    return BlockTable(np.full(len(start), case), start, size, known, labelled)


def _joined(tables: Sequence[BlockTable], ndim: int, targets: int) -> BlockTable:
    nowhere, nothing = np.zeros((0, ndim), np.int64), np.zeros((0, targets), np.int64)
    empty = BlockTable(np.zeros(0, np.int64), nowhere, nowhere, nothing, nothing)
    return BlockTable(
        *(
            np.concatenate([getattr(table, name) for table in (empty, *tables)])
            for name in BlockTable.__dataclass_fields__
        )
    )


def _request(case: Any, target: str, ignore: Mapping[str, int | None]) -> CountRequest:
    # Without a mask and an ignore label all is known, which takes no reading.
    limited = target in case.masks or ignore.get(target) is not None
    return CountRequest(ignore=ignore.get(target), known=limited, foreground=True)


def _grid(edges: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return start and size of every cell of a grid, in C order: int64 (N, D) each."""
    starts = np.meshgrid(*(axis[:-1] for axis in edges), indexing="ij")
    sizes = np.meshgrid(*(np.diff(axis) for axis in edges), indexing="ij")
    return tuple(np.stack([axis.ravel() for axis in grid], axis=1) for grid in (starts, sizes))  # type: ignore[return-value]


def draw_blocks(table: BlockTable, windows: np.ndarray, most: int | None, seed: int = 0) -> Draw:
    """Choose blocks at random until they hold as many windows as allowed, each with the number that it stands for.

    A volume's blocks are grouped by the targets that are labelled in them, background being a group too. Of each
    group a simple random sample is drawn, so that rare labels are met; a block of n drawn out of N counts N / n
    times. Weighted sums are then unbiased estimates of those over the whole volume (Horvitz and Thompson 1952). Where
    there are more volumes than the limit allows, a random subset of them is drawn, each with all of its groups.

    Args:
        table: blocks with a known voxel each.
        windows: (N,) windows of each block.
        most: windows of all drawn blocks together; None: all blocks. At least one block of each group of one volume is
            drawn.
        seed: of the choice.

    Returns:
        The blocks, first one with labels where there is one.
    """
    groups, group = np.unique(
        np.concatenate([table.case[:, None], table.labelled > 0], axis=1), axis=0, return_inverse=True
    )
    group = group.reshape(-1)
    if most is None or int(windows.sum()) <= most:
        order = np.argsort(~(table.labelled > 0).any(axis=1), kind="stable")
        return Draw(order, np.ones(len(order)))
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(table))
    shuffled = shuffled[np.argsort(group[shuffled], kind="stable")]
    sizes = np.bincount(group, minlength=len(groups))
    queues = np.split(shuffled, np.cumsum(sizes)[:-1])
    taken = _deal(groups, queues, windows, most, rng)
    drawn = np.bincount(group[taken], minlength=len(groups))
    return Draw(taken, sizes[group[taken]] / drawn[group[taken]])


def _deal(
    groups: np.ndarray, queues: Sequence[np.ndarray], windows: np.ndarray, most: int, rng: np.random.Generator
) -> np.ndarray:
    """Take blocks in turn from every group of every volume, until their windows are as many as allowed."""
    volumes = rng.permutation(np.unique(groups[:, 0]))
    # Groups with labels first.
    of_volume = {
        int(volume): [int(g) for g in np.flatnonzero(groups[:, 0] == volume)[::-1]] for volume in volumes
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
            # The first turn takes a volume whole: without its background its false alarms would not count.
            if total >= most:
                return np.array(taken)
    raise AssertionError("unreachable")


def cut(box: Box, largest: Sequence[int]) -> list[Box]:
    """Cut a box into blocks of nearly equal size, none larger than `largest` along any axis."""
    spans = [list(itertools.pairwise(axis.tolist())) for axis in block_edges(box, largest)]
    return [tuple(block) for block in itertools.product(*spans)]
