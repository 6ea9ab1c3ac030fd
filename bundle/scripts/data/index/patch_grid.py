"""The grid of patches over a region: candidate starts, displacements, and the cells that labels are counted in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from volumen.data.index.label_counts import CountRequest
from volumen.utils.boxes import Box, box_extent
from volumen.utils.errors import VolumenError

MAX_GRID_CELLS = 2**29
"""Above this many cells the counts of one target alone would take 2 GB."""

MAX_CELLS = 2**25
"""Above this many cells of the counting grid, training positions are tied more closely to the patch grid."""


@dataclass(frozen=True)
class PatchRules:
    """What makes a patch valid, and what is recorded of it."""

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
        """Return what is to be counted in a target's labels."""
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
    """One region's grid: candidate patch starts, and how they map to the (possibly coarser) label volume."""

    row: int
    box: Box
    grid: list[np.ndarray]
    candidates: list[np.ndarray]
    edges: list[np.ndarray]
    first: list[np.ndarray]
    last: list[np.ndarray]
    core_first: list[np.ndarray]
    core_last: list[np.ndarray]
    best: float = field(default=0.0)

    @property
    def voxels(self) -> np.ndarray:
        """Number of label voxels in each candidate patch; broadcasts to (candidates per axis...)."""
        total = np.ones((), np.int64)
        for edges, first, last in zip(self.edges, self.first, self.last):
            size = edges[last] - edges[first]
            # Almost always all are equal, which spares a large array.
            total = np.multiply.outer(total, size[:1] if (size == size[0]).all() else size)
        return total


def shift_table(rules: PatchRules, boxes: Sequence[Box]) -> tuple[tuple[int, ...], ...]:
    """Choose the displacements from the grid that are examined: at most 64, so that a patch's set fits 64
    bits.

    Per axis they cover half a stride to either side and differ modulo small powers of two, so that a patch
    does not always meet a network's strided convolutions in the same phase.
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
    if cells > MAX_GRID_CELLS:
        raise VolumenError(
            "stride",
            f"the patch grid of {' '.join(map(str, rules.stride))} voxels has {cells:.1e} cells",
            expected=f"at most {MAX_GRID_CELLS:.1e}",
            remedy="use a larger stride or a coarser valid_patch_find_resolution",
        )
    return (zero, *(shift for shift in itertools.product(*options) if shift != zero))


def _axis_shifts(stride: int, count: int) -> list[int]:
    """Return at most `count` displacements in -stride/2 to stride/2, zero first."""
    shifts = [0]
    for step in range(-(count // 2), count - count // 2):
        value = round(step * stride / count) + step % 4
        if abs(value) <= stride // 2 and value not in shifts:
            shifts.append(value)
    return shifts


def lay_grid(
    rules: PatchRules, row: int, box: Box, shifts: Sequence[tuple[int, ...]], case: Any, searched: Any
) -> GridRegion:
    """Lay the grid over a region, and its patches' borders over the volume that is searched."""
    fine = tuple(case.image.shape)
    coarse = next((tuple(v.shape) for v in searched.labels.values()), fine)
    region = GridRegion(row, box, [], [], [], [], [], [], [])
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


def _core(edges: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells of the central half of patches along an axis, to the nearest edge, of equals the outer one.

    The first patch's begins with the patch and the last one's ends with it, as no other could be more central there.
    Both results ascend with the patches.

    Args:
        edges: of the cells.
        begin, end: of the patches, ascending, among the edges.

    Returns:
        Index of the first cell and one past the last.
    """
    quarter = (end - begin) // 4
    first = _nearest(edges, begin + quarter)
    last = len(edges) - 1 - _nearest(-edges[::-1], -(end - quarter))
    first[0], last[-1] = np.searchsorted(edges, begin[0]), np.searchsorted(edges, end[-1])
    return first, np.maximum(last, first + 1)


def _nearest(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the index of the edge nearest to each value, the lower one of equals."""
    above = np.clip(np.searchsorted(edges, values), 1, len(edges) - 1)
    return np.where(values - edges[above - 1] <= edges[above] - values, above - 1, above)


def axis_starts(low: int, high: int, size: int, stride: int) -> np.ndarray:
    """Return the grid starts of patches along one axis of a region from `low` to `high`, ascending.

    The last patch ends where the region ends. A region smaller than the patch gets one patch, at its begin.
    """
    last = max(low, high - size)
    starts = np.arange(low, last + 1, stride, dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)
