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
# Blocks that are sorted at once.
_PIECE = 1 << 18


@dataclass(frozen=True)
class BlockTable:
    """N blocks of grids (D axes, T targets), which may be millions: what follows from the grids is not stored.

    Args:
        grids: index of the case, and edges per axis, of each region; its cells in C order are blocks.
        known: (N, T) uint32, known voxels of each target.
        labelled: (N, T) uint32, known voxels whose label is not 0.
        numbers: (N,) the cells that are blocks, counted through all grids; None: all.
    """

    grids: tuple[tuple[int, tuple[np.ndarray, ...]], ...]
    known: np.ndarray
    labelled: np.ndarray
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labelled)

    def with_known_voxels(self) -> BlockTable:
        """Return the blocks that have a known voxel of any target."""
        some = self.known.any(axis=1)
        if some.all():
            return self
        rows = np.flatnonzero(some)
        numbers = rows if self.numbers is None else self.numbers[rows]
        return BlockTable(self.grids, self.known[rows], self.labelled[rows], numbers)

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the case (n,), the first voxel (n, D) and the voxels per axis (n, D) of some rows (n,), int64."""
        numbers = np.asarray(rows if self.numbers is None else self.numbers[rows], np.int64)
        ends = np.cumsum([cell_count(edges) for _, edges in self.grids])
        grid = np.searchsorted(ends, numbers, side="right")
        cases = np.array([case for case, _ in self.grids], np.int64)[grid]
        ndim = len(self.grids[0][1]) if self.grids else 0
        start, size = np.zeros((2, len(numbers), ndim), np.int64)
        for place in np.unique(grid):
            chosen, edges = grid == place, self.grids[place][1]
            inside = numbers[chosen] - ends[place] + cell_count(edges)
            cells = np.unravel_index(inside, [len(axis) - 1 for axis in edges])
            for axis, (values, cell) in enumerate(zip(edges, cells)):
                start[chosen, axis], size[chosen, axis] = values[cell], values[cell + 1] - values[cell]
        return cases, start, size

    def cases(self) -> np.ndarray:
        """Return the index of each block's case, (N,) of the smallest type that holds it."""
        kind = np.min_scalar_type(max((case for case, _ in self.grids), default=0))
        every = [np.full(cell_count(edges), case, kind) for case, edges in self.grids]
        return self._of_blocks(every, kind)

    def windows(self, patch_size: Sequence[int]) -> np.ndarray:
        """Return the number of windows of each block, (N,) uint32; see `window_counts`."""
        return self._of_blocks([grid_windows(edges, patch_size) for _, edges in self.grids], np.uint32)

    def _of_blocks(self, every: Sequence[np.ndarray], kind: Any) -> np.ndarray:
        values = every[0] if len(every) == 1 else np.concatenate([*every, np.zeros(0, kind)])
        return values if self.numbers is None else values[self.numbers]

    def location(self, row: int, shape: Sequence[int]) -> PatchLocation:
        """Return the location of a block in a volume of that shape; the voxels around it may be read as halo."""
        (case,), (start,), (size,) = (part.tolist() for part in self.places(np.array([row])))
        return PatchLocation(case, tuple(start), tuple(size), whole_box(shape))


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


def grid_windows(edges: Sequence[np.ndarray], patch_size: Sequence[int]) -> np.ndarray:
    """Return the number of windows of each cell of a grid, in C order: (cells,) uint32."""
    counts = np.ones((), np.uint32)
    for axis_edges, patch in zip(edges, patch_size, strict=True):
        along = window_counts(np.diff(axis_edges)[:, None], (patch,)).astype(np.uint32)
        counts = np.multiply.outer(counts, along)
    return counts.ravel()


def cell_count(edges: Sequence[np.ndarray]) -> int:
    """Return the number of cells of a grid."""
    return math.prod(len(axis) - 1 for axis in edges)


def part_windows(
    boxes: Mapping[str, Sequence[Box]], patch_size: Sequence[int], largest: Sequence[int]
) -> np.ndarray:
    """Return the number of windows of each block of regions, without reading labels: uint32 (N,)."""
    counts = [
        grid_windows(block_edges(box, largest), patch_size) for parts in boxes.values() for box in parts
    ]
    return np.concatenate([*counts, np.zeros(0, np.uint32)])


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
    return [_joined(tables, len(targets)) for tables in parts]


def _table(
    case: int, edges: tuple[np.ndarray, ...], counts: Sequence[CellCounts | None], objects_only: bool
) -> BlockTable:
    """Return the blocks of one region; the counts of a target are None if the case lacks its label."""
    known, labelled = [], []
    for found in counts:
        if found is None:
            none = np.zeros(cell_count(edges), np.uint32)
            known.append(none)
            labelled.append(none)
            continue
        assert found.foreground is not None
        labelled.append(found.foreground.ravel())
        every = _voxels(edges) if found.known is None else found.known.ravel()
        known.append(labelled[-1] if objects_only else every)
    return BlockTable(((case, edges),), _columns(known), _columns(labelled))


def _columns(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays (N,) as the columns of one, without a copy of a single one."""
    return parts[0][:, None] if len(parts) == 1 else np.stack(parts, axis=1)


def _voxels(edges: Sequence[np.ndarray]) -> np.ndarray:
    """Return the number of voxels of each cell of a grid, in C order: (cells,) uint32."""
    counts = np.ones((), np.uint32)
    for axis_edges in edges:
        counts = np.multiply.outer(counts, np.diff(axis_edges).astype(np.uint32))
    return counts.ravel()


def _joined(tables: Sequence[BlockTable], targets: int) -> BlockTable:
    if len(tables) == 1:
        return tables[0]
    nothing = np.zeros((0, targets), np.uint32)
    return BlockTable(
        tuple(grid for table in tables for grid in table.grids),
        np.concatenate([nothing, *(table.known for table in tables)]),
        np.concatenate([nothing, *(table.labelled for table in tables)]),
    )


def _request(case: Any, target: str, ignore: Mapping[str, int | None]) -> CountRequest:
    # Without a mask and an ignore label every voxel is known, so nothing must be counted.
    limited = target in case.masks or ignore.get(target) is not None
    return CountRequest(ignore=ignore.get(target), known=limited, foreground=True)


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
    volumes, group = _groups(table)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(np.arange(len(table), dtype=np.min_scalar_type(len(table))))
    sizes = np.bincount(group)
    queues = _queues(shuffled, group, len(sizes), most)
    taken = _draw_in_turn(volumes, queues, windows, most, rng)
    drawn = np.bincount(group[taken], minlength=len(sizes))
    return Draw(taken, sizes[group[taken]] / drawn[group[taken]])


def _groups(table: BlockTable) -> tuple[np.ndarray, np.ndarray]:
    """Group the blocks by volume and by the targets that are labelled in them; background is a volume's first group.

    Small types are used, since there may be millions of blocks.

    Returns:
        The volume of each group, and each block's group (N,).
    """
    kinds = np.zeros(len(table), np.min_scalar_type((1 << table.labelled.shape[1]) - 1))
    for target, labelled in enumerate(table.labelled.T):
        kinds |= (labelled > 0).astype(kinds.dtype) << kinds.dtype.type(target)
    cases, step = table.cases(), int(kinds.max()) + 1
    keys = cases.astype(np.min_scalar_type((int(cases.max()) + 1) * step))
    keys *= keys.dtype.type(step)
    keys += kinds.astype(keys.dtype)
    found = np.unique(keys)
    return found // found.dtype.type(step), np.searchsorted(found, keys).astype(
        np.min_scalar_type(len(found))
    )


def _queues(shuffled: np.ndarray, group: np.ndarray, groups: int, most: int) -> list[np.ndarray]:
    """Return the first `most` rows of each group, in shuffled order; a block has a window, so no more are drawn."""
    found: list[list[np.ndarray]] = [[] for _ in range(groups)]
    for start in range(0, len(shuffled), _PIECE):
        piece = shuffled[start : start + _PIECE]
        piece = piece[np.argsort(group[piece], kind="stable")]
        for queue, rows in zip(found, np.split(piece, np.searchsorted(group[piece], np.arange(1, groups)))):
            queue.append(rows[:most].copy())
    return [np.concatenate(parts)[:most] for parts in found]


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
