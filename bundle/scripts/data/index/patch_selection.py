"""Selects the valid patches of a region's grid, their classes, and the displacements that keep them valid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from volumen.data.index.cells import window_extremes, window_sums
from volumen.data.index.label_counts import CellCounts
from volumen.data.index.patch_grid import GridRegion, PatchRules
from volumen.data.index.patch_index import PatchTable


def every_patch_of(rules: PatchRules, region: GridRegion) -> PatchTable:
    """Return all patches of a region's grid, without any condition."""
    starts = np.stack(np.meshgrid(*region.grid, indexing="ij"), -1).reshape(-1, len(region.grid))
    count = len(starts)
    return PatchTable(
        region=np.full(count, region.row, np.int32),
        start=starts.astype(np.int32),
        share=np.full(count, np.nan, np.float32),
        shifts=np.ones(count, np.uint64),
        class_shifts=np.zeros((len(rules.classes), count), np.uint64),
    )


def select(
    rules: PatchRules,
    region: GridRegion,
    counts: Mapping[str, CellCounts],
    shifts: Sequence[tuple[int, ...]],
) -> tuple[PatchTable, PatchTable]:
    """Return the foreground and the background patches of a region."""
    shape = tuple(len(c) for c in region.candidates)
    voxels = region.voxels
    needed = np.maximum(1, np.ceil(rules.min_labeled_ratio * voxels - 1e-6)).astype(np.int64)
    valid = np.zeros(shape, bool)
    occupied = np.zeros(shape, bool)
    known = np.zeros(shape, bool)
    share = np.zeros(shape, np.float32)
    present = np.zeros((len(rules.classes), *shape), bool)
    for cells in counts.values():
        labelled = window_sums(cells.labelled, region.first, region.last)
        np.maximum(share, labelled / voxels, out=share, casting="same_kind")
        enough = labelled >= needed
        if rules.min_bbox_percent > 0:
            enough &= _box_voxels(cells, region) >= rules.min_bbox_percent * voxels - 1e-6
        valid |= enough
        if cells.foreground is not None and cells.known is not None:
            occupied |= window_sums(cells.foreground, region.first, region.last) > 0
            known |= window_sums(cells.known, region.first, region.last) >= needed
    region.best = float(share.max(initial=0.0))
    if rules.background:
        empty = known & ~occupied
        valid &= occupied
    else:
        empty = np.zeros(shape, bool)
    if rules.classes:
        covered = _covered(region, valid, shifts)
        for target, cells in counts.items():
            _mark_classes(rules, target, cells, region, covered, present)
    return (
        _table(region, valid, share, present, shifts),
        _table(region, empty, share, present, shifts),
    )


def _box_voxels(cells: CellCounts, region: GridRegion) -> np.ndarray:
    """Return the number of voxels in the bounding box of each candidate's labelled voxels."""
    volume = np.ones((), np.int64)
    for low, high in zip(cells.low, cells.high):
        first = window_extremes(low, region.first, region.last, np.minimum)
        last = window_extremes(high, region.first, region.last, np.maximum)
        volume = volume * np.maximum(0, last.astype(np.int64) - first)
    return volume


def _mark_classes(
    rules: PatchRules,
    target: str,
    cells: CellCounts,
    region: GridRegion,
    covered: np.ndarray,
    present: np.ndarray,
) -> None:
    """Mark the candidates with a class in their central part, or with voxels of it that no central part covers."""
    rows = [i for i, (name, _) in enumerate(rules.classes) if name == target]
    if cells.classes is None:
        return
    for bit, row in enumerate(rows):
        holds = ((cells.classes >> np.uint64(bit)) & np.uint64(1)).astype(np.uint8)
        present[row] = window_sums(holds, region.core_first, region.core_last) > 0
        isolated = holds * ~covered
        if isolated.any():
            present[row] |= window_sums(isolated, region.first, region.last) > 0


def _covered(region: GridRegion, valid: np.ndarray, shifts: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return which cells lie in the central part of a patch that can be drawn."""
    reached = np.zeros(valid.shape, np.uint8)
    chosen = _on_grid(region, region.around, valid)
    for _, good, where in _moved(region, region.around, chosen, valid, shifts):
        reached[tuple(axis[good] for axis in where)] = 1
    # The candidates whose central part contains a cell are consecutive along every axis.
    cells = [np.arange(len(edges) - 1) for edges in region.edges]
    begin = [np.searchsorted(last, axis, side="right") for last, axis in zip(region.core_last, cells)]
    end = [np.searchsorted(first, axis, side="right") for first, axis in zip(region.core_first, cells)]
    return window_sums(reached, begin, end) > 0


def _on_grid(region: GridRegion, grid: Sequence[np.ndarray], valid: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the indices of the valid grid patches along the axes of the grid."""
    home = [np.searchsorted(c, g) for c, g in zip(region.candidates, grid)]
    return np.nonzero(valid[np.ix_(*home)])


def _moved(
    region: GridRegion,
    grid: Sequence[np.ndarray],
    chosen: tuple[np.ndarray, ...],
    valid: np.ndarray,
    shifts: Sequence[tuple[int, ...]],
) -> Iterator[tuple[int, np.ndarray, tuple[np.ndarray, ...]]]:
    """Yield each displacement's number, which of the chosen grid patches stay valid with it, and their new indices.

    The new indices are those of candidates along every axis.
    """
    starts = [axis_grid[index] for axis_grid, index in zip(grid, chosen)]
    for i, shift in enumerate(shifts):
        inside = np.ones(len(starts[0]), bool)
        where = []
        for start, moved, candidates in zip(starts, shift, region.candidates):
            position = np.minimum(np.searchsorted(candidates, start + moved), len(candidates) - 1)
            inside &= candidates[position] == start + moved
            where.append(position)
        yield i, inside & valid[tuple(where)], tuple(where)


def _table(
    region: GridRegion,
    valid: np.ndarray,
    share: np.ndarray,
    present: np.ndarray,
    shifts: Sequence[tuple[int, ...]],
) -> PatchTable:
    """Collect the grid patches that are valid, with the displacements that keep them so."""
    chosen = _on_grid(region, region.grid, valid)
    starts = [grid[index] for grid, index in zip(region.grid, chosen)]
    count = len(starts[0])
    bits = np.zeros(count, np.uint64)
    class_bits = np.zeros((len(present), count), np.uint64)
    home = chosen
    for i, good, where in _moved(region, region.grid, chosen, valid, shifts):
        bits |= good.astype(np.uint64) << np.uint64(i)
        for row, holds in enumerate(present):
            class_bits[row] |= (good & holds[where]).astype(np.uint64) << np.uint64(i)
        if i == 0:
            home = where
    return PatchTable(
        region=np.full(count, region.row, np.int32),
        start=np.stack(starts, 1).astype(np.int32),
        share=share[home],
        shifts=bits,
        class_shifts=class_bits,
    )
