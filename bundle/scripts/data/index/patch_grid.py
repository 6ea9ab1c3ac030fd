"""The grid of patches over a region: candidate starts, displacements, and the cells in which labels are counted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from volumen.data.index.label_counts import CountRequest
from volumen.utils.boxes import Box, box_extent, cells_in_ranges
from volumen.utils.errors import VolumenError

MAX_GRID_CELLS = 2**29
"""Largest number of cells: above it, the counts of one target would take 2 GB."""

MAX_CELLS = 2**25
"""Above this number of cells of the counting grid, fewer displacements from the patch grid are examined."""

WHOLE_CELLS = 2**21
"""Above this number of cells a region is divided into subregions, and only those that may have labels are searched."""

_SUBREGION_CELLS = 2**17


@dataclass(frozen=True)
class PatchRules:
    """The conditions for a valid patch, and the properties that are recorded."""

    patch_size: tuple[int, ...]
    stride: tuple[int, ...]
    targets: tuple[str, ...]
    min_labeled_ratio: float
    min_bbox_percent: float
    ignore_labels: dict[str, int]
    classes: tuple[tuple[str, int], ...]
    background: bool
    jitter: bool
    every_patch: bool
    objects_only: bool

    def request(self, target: str) -> CountRequest:
        """Return the counts that a target's labels require."""
        return CountRequest(
            ignore=self.ignore_labels.get(target),
            known=self.background,
            foreground=self.background,
            extent=self.min_bbox_percent > 0,
            classes=tuple(value for name, value in self.classes if name == target),
            objects_only=self.objects_only,
        )


@dataclass
class GridRegion:
    """The grid of one region: candidate patch starts, and their mapping to the (possibly coarser) label volume.

    Of a subregion, `grid` contains the patches for which it returns results; `around` also includes the neighbours
    that affect these results.
    """

    row: int
    box: Box
    grid: list[np.ndarray]
    candidates: list[np.ndarray]
    edges: list[np.ndarray]
    first: list[np.ndarray]
    last: list[np.ndarray]
    core_first: list[np.ndarray]
    core_last: list[np.ndarray]
    around: list[np.ndarray] = field(default_factory=list)
    best: float = field(default=0.0)

    @property
    def cells(self) -> int:
        """Number of cells in which labels are counted."""
        return math.prod(len(edges) - 1 for edges in self.edges)

    @property
    def patches(self) -> int:
        """Number of patches of the grid."""
        return math.prod(len(grid) for grid in self.grid)

    @property
    def voxels(self) -> np.ndarray:
        """Number of label voxels in each candidate patch; broadcasts to (candidates per axis...)."""
        total = np.ones((), np.int64)
        for edges, first, last in zip(self.edges, self.first, self.last):
            size = edges[last] - edges[first]
            # Almost always all are equal, which avoids a large array.
            total = np.multiply.outer(total, size[:1] if (size == size[0]).all() else size)
        return total


def shift_table(rules: PatchRules, boxes: Sequence[Box]) -> tuple[tuple[int, ...], ...]:
    """Choose the examined displacements from the grid: at most 64, so that those of a patch fit into 64 bits.

    Per axis they cover half a stride to both sides and differ modulo small powers of two, so that patches do not always
    have the same phase relative to a network's strided convolutions.
    """
    zero = (0,) * len(rules.patch_size)
    most = {1: 16, 2: 8}.get(len(zero), 4) if rules.jitter else 1
    for per_axis in sorted({most, max(1, most // 2), 1}, reverse=True):
        options = [_axis_shifts(stride, per_axis) for stride in rules.stride]
        cells = sum(
            math.prod(
                2 * len(option) * (extent // stride + 2)
                for option, extent, stride in zip(options, box_extent(box), rules.stride)
            )
            for box in boxes
        )
        if cells <= MAX_CELLS:
            break
    return (zero, *(shift for shift in itertools.product(*options) if shift != zero))


def _axis_shifts(stride: int, count: int) -> list[int]:
    """Return at most `count` displacements from -stride/2 to stride/2, zero first."""
    shifts = [0]
    for step in range(-(count // 2), count - count // 2):
        value = round(step * stride / count) + step % 4
        if abs(value) <= stride // 2 and value not in shifts:
            shifts.append(value)
    return shifts


def lay_grid(
    rules: PatchRules, row: int, box: Box, shifts: Sequence[tuple[int, ...]], case: Any, searched: Any
) -> GridRegion:
    """Place the grid over a region, and the borders of its patches over the searched volume."""
    fine = tuple(case.image.shape)
    coarse = next((tuple(v.shape) for v in searched.labels.values()), fine)
    region = GridRegion(row, box, [], [], [], [], [], [], [])
    region.around = region.grid
    for axis, ((low, high), size, stride) in enumerate(zip(box, rules.patch_size, rules.stride)):
        grid = axis_starts(low, high, size, stride)
        moved = np.unique(np.add.outer(grid, sorted({shift[axis] for shift in shifts})))
        candidates = moved[(moved >= low) & (moved + size <= high)] if high - low >= size else grid
        factor = fine[axis] / coarse[axis]
        begin = np.minimum(np.floor(candidates / factor).astype(np.int64), coarse[axis] - 1)
        end = np.ceil(np.minimum(candidates + size, high) / factor).astype(np.int64)
        end = np.clip(end, begin + 1, coarse[axis])
        edges = np.unique(np.concatenate([begin, end]))
        region.grid.append(grid)
        region.candidates.append(candidates)
        region.edges.append(edges)
        region.first.append(np.searchsorted(edges, begin))
        region.last.append(np.searchsorted(edges, end))
        core_first, core_last = _core(edges, begin, end)
        region.core_first.append(core_first)
        region.core_last.append(core_last)
    return region


def check_cells(rules: PatchRules, cells: int) -> None:
    """Refuse more cells than fit in memory.

    Raises:
        VolumenError: there are too many cells; names the stride.
    """
    if cells > MAX_GRID_CELLS:
        raise VolumenError(
            "stride",
            f"the patch grid of {' '.join(map(str, rules.stride))} voxels has {cells:.1e} cells",
            expected=f"at most {MAX_GRID_CELLS:.1e}",
            remedy="use a larger stride or a coarser valid_patch_find_resolution",
        )


def subregions(
    rules: PatchRules,
    region: GridRegion,
    shifts: Sequence[tuple[int, ...]],
    tiles: np.ndarray,
    tile: Sequence[int],
) -> list[GridRegion]:
    """Divide a region's grid into subregions, without those whose patches overlap no tile.

    All subregions together have the same result as the region: each includes the neighbours that affect its result.

    Args:
        rules: what makes a patch valid.
        region: the whole grid.
        shifts: displacements of patches from the grid.
        tiles: (T, D) indices of the tiles of the searched volume that may contain labels.
        tile: voxels per axis of a tile.

    Returns:
        The region itself if it is small, else subregions in lexicographic order.

    Raises:
        VolumenError: all subregions together have more cells than fit in memory.
    """
    if region.cells <= WHOLE_CELLS:
        return [region]
    per_axis = _SUBREGION_CELLS ** (1 / len(region.grid))
    cuts = []
    for grid, edges in zip(region.grid, region.edges):
        step = max(2, int(per_axis * len(grid) / len(edges)))
        cuts.append([(first, min(first + step, len(grid))) for first in range(0, len(grid), step)])
    spans = [
        [_candidates_of(rules, region, shifts, axis, cut) for cut in axis_cuts]
        for axis, axis_cuts in enumerate(cuts)
    ]
    touched = _touched(region, spans, tiles, tile)
    cells = np.ones(len(touched))
    for axis, axis_spans in enumerate(spans):
        first, last = region.first[axis], region.last[axis]
        cells *= np.array([last[high - 1] - first[low] for low, high in axis_spans])[touched[:, axis]]
    check_cells(rules, int(cells.sum()))
    return [
        _subregion(
            region, [cuts[a][i] for a, i in enumerate(index)], [spans[a][i] for a, i in enumerate(index)]
        )
        for index in touched.tolist()
    ]


def _candidates_of(
    rules: PatchRules, region: GridRegion, shifts: Sequence[tuple[int, ...]], axis: int, cut: tuple[int, int]
) -> tuple[int, int]:
    """Return the first and one past the last candidate that affect a part of an axis of the grid."""
    grid, candidates = region.grid[axis], region.candidates[axis]
    moves = [shift[axis] for shift in shifts]
    low, high = grid[cut[0]] + min(moves), grid[cut[1] - 1] + max(moves)
    if rules.classes:
        # Whether another patch covers a cell with its centre depends on overlapping neighbours and their displacements.
        reach = rules.patch_size[axis] + max(moves) - min(moves)
        low, high = low - reach, high + reach
    return int(np.searchsorted(candidates, low)), int(np.searchsorted(candidates, high, side="right"))


def _touched(
    region: GridRegion, spans: Sequence[Sequence[tuple[int, int]]], tiles: np.ndarray, tile: Sequence[int]
) -> np.ndarray:
    """Return the indices of the subregions with a candidate patch that overlaps a tile, in lexicographic order."""
    firsts, lasts = [], []
    for axis, axis_spans in enumerate(spans):
        edges = region.edges[axis]
        begin = np.array([edges[region.first[axis][low]] for low, _ in axis_spans])
        end = np.array([edges[region.last[axis][high - 1]] for _, high in axis_spans])
        start = tiles[:, axis] * tile[axis]
        firsts.append(np.searchsorted(end, start, side="right"))
        lasts.append(np.searchsorted(begin, start + tile[axis], side="left") - 1)
    return cells_in_ranges(np.stack(firsts, 1), np.stack(lasts, 1))


def _subregion(
    region: GridRegion, cut: Sequence[tuple[int, int]], span: Sequence[tuple[int, int]]
) -> GridRegion:
    subregion = GridRegion(region.row, region.box, [], [], [], [], [], [], [], [])
    for axis, ((begin, end), (low, high)) in enumerate(zip(cut, span)):
        grid, candidates = region.grid[axis], region.candidates[axis][low:high]
        start, stop = int(region.first[axis][low]), int(region.last[axis][high - 1])
        subregion.grid.append(grid[begin:end])
        subregion.around.append(grid[(grid >= candidates[0]) & (grid <= candidates[-1])])
        subregion.candidates.append(candidates)
        subregion.edges.append(region.edges[axis][start : stop + 1])
        subregion.first.append(region.first[axis][low:high] - start)
        subregion.last.append(region.last[axis][low:high] - start)
        subregion.core_first.append(region.core_first[axis][low:high] - start)
        subregion.core_last.append(region.core_last[axis][low:high] - start)
    return subregion


def _core(edges: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells of the central half of patches along an axis, rounded to the nearest edge (ties go outward).

    The central part of the first patch begins with the patch, and that of the last patch ends with it, since no other
    patch is more central there. Both results ascend with the patches.

    Args:
        edges: edges of the cells.
        begin, end: starts and ends of the patches, ascending; each is an edge.

    Returns:
        Index of the first cell and one past the last.
    """
    quarter = (end - begin) // 4
    first = _nearest(edges, begin + quarter)
    last = len(edges) - 1 - _nearest(-edges[::-1], -(end - quarter))
    first[0], last[-1] = np.searchsorted(edges, begin[0]), np.searchsorted(edges, end[-1])
    return first, np.maximum(last, first + 1)


def _nearest(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the index of the edge nearest to each value; the lower one if two are equally near."""
    above = np.clip(np.searchsorted(edges, values), 1, len(edges) - 1)
    return np.where(values - edges[above - 1] <= edges[above] - values, above - 1, above)


def axis_starts(low: int, high: int, size: int, stride: int) -> np.ndarray:
    """Return the grid starts of patches along one axis of a region from `low` to `high`, ascending.

    The last patch ends at the region's end. A region smaller than the patch gets one patch, at its start.
    """
    last = max(low, high - size)
    starts = np.arange(low, last + 1, stride, dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)
