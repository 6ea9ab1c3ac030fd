"""Distances between surfaces of masks that come block by block: exact for blocks of any size.

A block is measured with a halo of `REACH` voxels, within which the nearest surface of the other mask mostly lies. Of
surface voxels that have none there, only their block is noted. They are measured when all blocks are known, against
the cells of the volume that may hold the nearest surface voxel, which a coarse map of boxes around the surfaces tells.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from volumen.metrics.grid import BlockGrid, Region, inside, three_axes
from volumen.metrics.surface import DistanceCounts, SurfaceDistances, surface_voxels
from volumen.utils.jit import compiled

REACH = 12
"""Voxels of the smallest side around a block in which the other surface is looked for first."""
CELL = 32
"""Voxels per axis of a cell of the coarse map."""
_CACHED = 32

Read = Callable[[Region], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Gives prediction, truth and known voxels, each bool (Z, Y, X), of a region of the volume."""


@compiled
def _steps_in_row(feature, most):
    """Return the steps to the nearest True voxel of the same row, uint16 (Z, Y, X); `most` where there is none."""
    nz, ny, nx = feature.shape
    out = np.empty((nz, ny, nx), np.uint16)
    for z in range(nz):
        for y in range(ny):
            steps = most
            for x in range(nx):
                steps = 0 if feature[z, y, x] else min(steps + 1, most)
                out[z, y, x] = steps
            steps = most
            for x in range(nx - 1, -1, -1):
                steps = 0 if feature[z, y, x] else min(steps + 1, most)
                out[z, y, x] = min(out[z, y, x], steps)
    return out


@compiled
def _nearest_of(voxels, steps, offsets, costs, step_costs, limit):
    """Return the squared distance of voxels to the nearest surface, infinite where it is above `limit`.

    Args:
        voxels: int64 (n, 3).
        steps: as of `_steps_in_row`.
        offsets: int64 (m, 2), steps along z and y, those of the smallest cost first.
        costs: float64 (m,), squared length of each.
        step_costs: float64 (most + 1,), squared length of steps along x; the last is infinite.
        limit: squared distance.
    """
    nz, ny, _ = steps.shape
    out = np.empty(len(voxels), np.float64)
    for i in range(len(voxels)):
        z, y, x = voxels[i, 0], voxels[i, 1], voxels[i, 2]
        best = np.inf
        for j in range(len(offsets)):
            if costs[j] >= best:
                break
            a, b = z + offsets[j, 0], y + offsets[j, 1]
            if 0 <= a < nz and 0 <= b < ny:
                best = min(best, costs[j] + step_costs[steps[a, b, x]])
        out[i] = best if best <= limit else np.inf
    return out


@compiled
def _improve(voxels, others, step, low, high, best):
    """Lower the squared distances `best` of voxels to those to the nearest of other voxels.

    Args:
        voxels: int64 (n, 3).
        others: int64 (m, 3).
        step: float64 (3,), voxel size.
        low, high: int64 (3,), first and last voxel of the box around the others.
        best: float64 (n,), changed in place.
    """
    for i in range(len(voxels)):
        least = 0.0
        for axis in range(3):
            gap = max(low[axis] - voxels[i, axis], voxels[i, axis] - high[axis], 0)
            least += (gap * step[axis]) * (gap * step[axis])
        if least >= best[i]:
            continue
        for j in range(len(others)):
            dz = (voxels[i, 0] - others[j, 0]) * step[0]
            dy = (voxels[i, 1] - others[j, 1]) * step[1]
            dx = (voxels[i, 2] - others[j, 2]) * step[2]
            best[i] = min(best[i], (dz * dz + dy * dy) + dx * dx)


@compiled
def _widen(voxels, side, low, high):
    """Widen the boxes of the cells that voxels lie in: low and high are int32 (cells z, y, x, 3)."""
    for i in range(len(voxels)):
        z, y, x = voxels[i, 0] // side, voxels[i, 1] // side, voxels[i, 2] // side
        for axis in range(3):
            low[z, y, x, axis] = min(low[z, y, x, axis], voxels[i, axis])
            high[z, y, x, axis] = max(high[z, y, x, axis], voxels[i, axis])


_NOWHERE = np.iinfo(np.int32).max


@dataclass
class CoarseMap:
    """Boxes around the surface voxels in each cell of a volume.

    Args:
        shape: cells per axis.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.low = np.full((*self.shape, 3), _NOWHERE, np.int32)
        self.high = np.full((*self.shape, 3), -1, np.int32)

    def add(self, voxels: np.ndarray) -> None:
        """Add surface voxels, int64 (n, 3)."""
        _widen(voxels, CELL, self.low, self.high)

    def merge(self, other: CoarseMap) -> None:
        """Add those of another map."""
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)

    def boxes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the cells with surface voxels, int64 (n, 3), the first and the last voxel of each box."""
        cells = np.argwhere(self.high[..., 0] >= 0)
        place = tuple(cells.T)
        return cells, self.low[place].astype(np.int64), self.high[place].astype(np.int64)


@dataclass
class SurfaceTally:
    """Distances between the surfaces of a prediction and a truth, block by block.

    Args:
        grid: the blocks.
        spacing: voxel size per axis of the volume, two or three axes.
        border: see `surface_voxels`.
    """

    grid: BlockGrid
    spacing: tuple[float, ...]
    border: bool = False
    near: list[DistanceCounts] = field(default_factory=lambda: [DistanceCounts(), DistanceCounts()])
    far: list[set[int]] = field(default_factory=lambda: [set(), set()])

    def __post_init__(self) -> None:
        self._axes = tuple(range(3 - len(self.spacing), 3))
        # The added axis of an image has one slice, and its step does not count.
        self._step = np.array((1.0,) * (3 - len(self.spacing)) + tuple(float(s) for s in self.spacing))
        self._reach = REACH * min(self.spacing)
        cells = tuple(math.ceil(n / CELL) for n in self.grid.shape)
        self.maps = [CoarseMap(cells), CoarseMap(cells)]

    @property
    def halo(self) -> tuple[int, int, int]:
        """Voxels per axis that are read around a block."""
        return tuple(  # type: ignore[return-value]
            math.floor(self._reach / self._step[axis] + 1e-9) + 1 if axis in self._axes else 0
            for axis in range(3)
        )

    @property
    def diagonal(self) -> float:
        """Length of the volume's diagonal."""
        lengths = [self.grid.shape[axis] * self._step[axis] for axis in self._axes]
        return math.sqrt(sum(length**2 for length in lengths))

    def add(
        self, number: int, outer: Region, pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None
    ) -> None:
        """Add a block.

        Args:
            number: which block.
            outer: the region of the arrays: the block and at least its halo.
            pred, truth: bool (Z, Y, X).
            known: bool (Z, Y, X); voxels outside it have no surface. None: all are known.
        """
        surfaces = self._surfaces(pred, truth, known)
        box = self.grid.box(number)
        own = [self._voxels(surface, box, outer) for surface in surfaces]
        for side in (0, 1):
            self.maps[side].add(own[side] + [part.start for part in outer])
            squared = self._squared(own[side], surfaces[1 - side])
            near = np.isfinite(squared)
            self.near[side] += DistanceCounts.of(squared[near])
            if not near.all():
                self.far[side].add(number)

    def _surfaces(
        self, pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the surfaces in a region.

        At the ends of a region inside the volume they are wrong, which no voxel within reach of a block is.
        """
        found = [surface_voxels(mask, known, self.border, self._axes) for mask in (pred, truth)]
        return found[0], found[1]

    @staticmethod
    def _voxels(surface: np.ndarray, box: Region, outer: Region) -> np.ndarray:
        """Return the surface voxels of a block by their place in its region, int64 (n, 3)."""
        part = inside(box, outer)
        return np.argwhere(surface[part]).astype(np.int64) + [side.start for side in part]

    def _squared(self, voxels: np.ndarray, surface: np.ndarray) -> np.ndarray:
        """Return squared distances to the nearest surface voxel of a region, infinite beyond the reach."""
        if not len(voxels) or not surface.any():
            return np.full(len(voxels), np.inf)
        most = math.floor(self._reach / self._step[2] + 1e-9) + 1
        along = [
            np.arange(-h, h + 1) if h else np.zeros(1, np.int64)
            for h in (max(side - 1, 0) for side in self.halo[:2])
        ]
        offsets = np.stack(np.meshgrid(*along, indexing="ij"), -1).reshape(-1, 2).astype(np.int64)
        lengths = offsets * self._step[:2]
        costs = (lengths * lengths).sum(axis=1)
        limit = (self._reach * (1 + 1e-9)) ** 2
        order = np.argsort(costs, kind="stable")
        order = order[costs[order] <= limit]
        steps = (np.arange(most + 1) * self._step[2]) ** 2
        steps[most] = np.inf
        return _nearest_of(voxels, _steps_in_row(surface, most), offsets[order], costs[order], steps, limit)

    def merge(self, other: SurfaceTally) -> None:
        """Add the blocks of another accumulator."""
        for side in (0, 1):
            self.near[side] += other.near[side]
            self.far[side] |= other.far[side]
            self.maps[side].merge(other.maps[side])

    def distances(self, read: Read) -> SurfaceDistances:
        """Return the distances once all blocks were added.

        Args:
            read: gives any region of the volume, for surface voxels that are far from the other surface.
        """
        found = []
        for side in (0, 1):
            counts = self.near[side]
            for part in self._far(side, read):
                counts += DistanceCounts.of(part)
            found.append(counts)
        return SurfaceDistances(found[0], found[1], self.diagonal)

    def _far(self, side: int, read: Read) -> Iterator[np.ndarray]:
        """Yield the squared distances of the far surface voxels of each block."""
        target = self.maps[1 - side].boxes()
        cells = _Cells(self, 1 - side, read)
        for number in sorted(self.far[side]):
            box = self.grid.box(number)
            outer = self._around(box)
            surfaces = self._surfaces(*read(outer))
            voxels = self._voxels(surfaces[side], box, outer)
            voxels = voxels[np.isinf(self._squared(voxels, surfaces[1 - side]))]
            if not len(target[0]):
                yield np.full(len(voxels), self.diagonal**2)
                continue
            voxels = voxels + [part.start for part in outer]
            _, group = np.unique(voxels // CELL, axis=0, return_inverse=True)
            order = np.argsort(group.reshape(-1), kind="stable")
            for rows in np.split(order, np.flatnonzero(np.diff(group.reshape(-1)[order])) + 1):
                yield self._farther(voxels[rows], target, cells)

    def _around(self, box: Region) -> Region:
        return tuple(
            slice(max(0, part.start - halo), min(n, part.stop + halo))
            for part, halo, n in zip(box, self.halo, self.grid.shape, strict=True)
        )

    def _farther(
        self, voxels: np.ndarray, target: tuple[np.ndarray, np.ndarray, np.ndarray], cells: _Cells
    ) -> np.ndarray:
        """Return the squared distances of voxels of one cell to the surface voxels of all cells."""
        where, low, high = target
        first, last = voxels.min(axis=0), voxels.max(axis=0)
        gap = np.maximum(np.maximum(low - last, first - high), 0) * self._step
        span = np.maximum(np.abs(high - first), np.abs(last - low)) * self._step
        least = (gap * gap).sum(axis=1)
        # Every voxel here has a surface voxel within the farthest corner of any box.
        candidates = np.flatnonzero(least <= (span * span).sum(axis=1).min() * (1 + 1e-9))
        best = np.full(len(voxels), np.inf)
        for i in candidates[np.argsort(least[candidates], kind="stable")]:
            if least[i] > best.max():
                break
            _improve(voxels, cells.voxels(where[i]), self._step, low[i], high[i], best)
        return best


class _Cells:
    """The surface voxels of cells of a volume, read when needed; the last ones stay in memory.

    Args:
        tally: says what a surface is.
        side: 0 for the prediction's surface, 1 for that of the truth.
        read: gives any region of the volume.
    """

    def __init__(self, tally: SurfaceTally, side: int, read: Read) -> None:
        self._tally, self._side, self._read = tally, side, read
        self._groups: OrderedDict[tuple[int, ...], dict[tuple[int, ...], np.ndarray]] = OrderedDict()

    def voxels(self, cell: np.ndarray) -> np.ndarray:
        """Return the surface voxels of a cell, int64 (n, 3)."""
        group = tuple(int(c) // 4 for c in cell)
        if group not in self._groups:
            self._groups[group] = self._of_group(group)
            if len(self._groups) > _CACHED:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group][tuple(int(c) for c in cell)]

    def _of_group(self, group: Sequence[int]) -> dict[tuple[int, ...], np.ndarray]:
        grid, side = self._tally.grid, 4 * CELL
        box = tuple(slice(g * side, min((g + 1) * side, n)) for g, n in zip(group, grid.shape, strict=True))
        outer = grid.around(box, 1)
        surface = self._tally._surfaces(*self._read(outer))[self._side]
        found = self._tally._voxels(surface, box, outer) + [part.start for part in outer]
        cells, member = np.unique(found // CELL, axis=0, return_inverse=True)
        order = np.argsort(member.reshape(-1), kind="stable")
        parts = np.split(found[order], np.flatnonzero(np.diff(member.reshape(-1)[order])) + 1)
        return {tuple(int(c) for c in cell): part for cell, part in zip(cells, parts, strict=True)}


def surface_distances(
    pred: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float] | None = None,
    known: np.ndarray | None = None,
    border: bool = False,
) -> SurfaceDistances:
    """Measure the distances between two surfaces in memory, voxel centre to voxel centre.

    Args:
        pred: bool (Y, X) or (Z, Y, X).
        truth: bool, same shape.
        spacing: voxel size in spatial order; None is 1.
        known: bool; voxels outside it have no label, and no surface.
        border: see `surface_voxels`.
    """
    step = tuple(float(s) for s in (spacing or (1.0,) * pred.ndim))
    if len(step) != pred.ndim:
        raise ValueError(f"spacing must have {pred.ndim} entries, got {step}")
    certain = np.ones(pred.shape, bool) if known is None else known
    arrays = tuple(np.ascontiguousarray(three_axes(x)) for x in (pred, truth, certain))
    tally = SurfaceTally(BlockGrid.of(pred.shape, pred.shape), step, border)
    tally.add(0, tally.grid.box(0), arrays[0], arrays[1], arrays[2])
    return tally.distances(lambda region: (arrays[0][region], arrays[1][region], arrays[2][region]))
