"""Expected run length: how far one can follow an object before the prediction breaks off or errs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from volumen.metrics.grid import BlockGrid, Region, inside
from volumen.metrics.topology.components import ComponentJoin, label_components
from volumen.utils.connected import roots_of
from volumen.utils.jit import compiled


def expected_run_length(
    objects: np.ndarray,
    edges: np.ndarray,
    lengths: np.ndarray,
    predicted: np.ndarray,
    merged: Sequence[int] | None = None,
) -> float:
    """Return the expected run length of given skeletons, Januszewski et al. 2018; 0 is the worst.

    An edge is right where both of its nodes lie in the same predicted object, which is no merger. Right edges that
    hang together are a run. A place is drawn at random along all skeletons; the result is the mean length of the run
    that it lies in, 0 where it lies in none. NaN without any length.

    Args:
        objects: integer (nodes,), the true object that each node belongs to.
        edges: integer (edges, 2), nodes that each edge connects.
        lengths: (edges,), the length of each, in any unit.
        predicted: integer (nodes,), the predicted object at each node, 0 for none.
        merged: predicted objects that are mergers; None: those with nodes of several true objects.
    """
    total = float(np.sum(lengths))
    if not total:
        return math.nan
    if merged is None:
        pairs = np.unique(np.stack([predicted, objects], axis=1), axis=0)
        numbers, times = np.unique(pairs[:, 0], return_counts=True)
        merged = numbers[times > 1].tolist()
    usable = (predicted != 0) & ~np.isin(predicted, np.asarray(merged, dtype=np.int64))
    first, second = edges[:, 0], edges[:, 1]
    right = usable[first] & usable[second] & (predicted[first] == predicted[second])
    roots = roots_of(len(objects), [edges[right].astype(np.int64)])
    runs = np.bincount(roots[first[right]], weights=np.asarray(lengths, np.float64)[right])
    return float((runs**2).sum() / total)


@compiled
def _mean_steps(skeleton, steps, alone, out):
    """Write the mean distance of each skeleton voxel to its 26 neighbours in the skeleton.

    Args:
        skeleton: bool (Z, Y, X).
        steps: float64 (3, 3, 3), distance to the neighbour at each offset from -1 to 1.
        alone: length of a voxel without a neighbour.
        out: float64 (Z, Y, X), written in place.
    """
    nz, ny, nx = skeleton.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if not skeleton[z, y, x]:
                    continue
                total, count = 0.0, 0
                for a in range(max(z - 1, 0), min(z + 2, nz)):
                    for b in range(max(y - 1, 0), min(y + 2, ny)):
                        for c in range(max(x - 1, 0), min(x + 2, nx)):
                            if skeleton[a, b, c] and (a != z or b != y or c != x):
                                total += steps[a - z + 1, b - y + 1, c - x + 1]
                                count += 1
                out[z, y, x] = total / count if count else alone


def voxel_lengths(skeleton: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return the length that each skeleton voxel stands for: its mean distance to its neighbours in the skeleton.

    Along a line of voxels these lengths add up to the length of the line, in any direction and for any voxel size. A
    voxel without a neighbour is as long as the smallest side of a voxel.

    Args:
        skeleton: bool (Z, Y, X).
        spacing: voxel size (z, y, x).

    Returns:
        float64 (Z, Y, X), in units of the spacing; 0 outside the skeleton.
    """
    offsets = np.stack(np.meshgrid(*([-1, 0, 1],) * 3, indexing="ij"), axis=-1)
    steps = np.sqrt(((offsets * np.asarray(spacing, np.float64)) ** 2).sum(axis=-1))
    out = np.zeros(skeleton.shape)
    _mean_steps(np.ascontiguousarray(skeleton), steps, float(min(spacing)), out)
    return out


@dataclass
class RunTally:
    """Runs along the skeletons of the true objects of a mask, block by block.

    A run is a connected part (26 neighbours) of the truth's skeleton that lies in the prediction. Its length is the sum
    of the `voxel_lengths` of its voxels.

    Args:
        grid: the blocks.
        spacing: voxel size, one per axis of the volume.
    """

    grid: BlockGrid
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    total: float = 0.0
    _rows: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._runs = ComponentJoin(self.grid)

    def add(self, number: int, around: Region, skeleton: np.ndarray, pred: np.ndarray, first: int) -> None:
        """Add a block.

        Args:
            number: which block.
            around: the block and one plane of voxels around it, cut at the volume's end.
            skeleton: bool (Z, Y, X), that of the truth in `around`.
            pred: uint32, components of the prediction in the block and in one plane behind it on every axis.
            first: what makes the numbers of `pred` those of the volume.
        """
        box = self.grid.box(number)
        behind = inside(self.grid.around(box, 0, 1), around)
        labels, count = label_components(skeleton[behind] & (pred > 0), 26)
        start = self._runs.add(number, labels, count)
        # A flat image has one slice, and no distance across it.
        size = (min(self.spacing),) * (3 - len(self.spacing)) + tuple(self.spacing)
        lengths = voxel_lengths(skeleton, size)[inside(box, around)].reshape(-1)
        self.total += float(lengths.sum())
        own = tuple(slice(0, part.stop - part.start) for part in box)
        inner = labels[own].reshape(-1)
        used = np.flatnonzero(inner)
        runs, place, which = np.unique(inner[used], return_index=True, return_inverse=True)
        component = pred[own].reshape(-1)[used][place].astype(np.int64) - 1 + first
        sums = np.bincount(which.reshape(-1), weights=lengths[used], minlength=len(runs))
        self._rows.append((np.column_stack([runs.astype(np.int64) - 1 + start, component]), sums))

    def merge(self, other: RunTally, shift: int) -> None:
        """Add the blocks of another accumulator, whose components of the prediction are shifted by `shift`."""
        moved = self._runs.merge(other._runs)
        self.total += other.total
        self._rows += [(rows + np.array([moved, shift]), sums) for rows, sums in other._rows]

    def length(self, roots: np.ndarray, merged: np.ndarray) -> float:
        """Return the expected run length in units of the spacing; NaN where the truth has no skeleton.

        Args:
            roots: joined number of each component of the prediction.
            merged: joined numbers of those that are mergers: nothing in them is a run.
        """
        if not self.total:
            return math.nan
        rows = np.concatenate([np.zeros((0, 2), np.int64), *(rows for rows, _ in self._rows)])
        sums = np.concatenate([np.zeros(0), *(sums for _, sums in self._rows)])
        usable = ~np.isin(roots[rows[:, 1]], merged) if len(rows) else np.zeros(0, bool)
        rows, sums = rows[usable], sums[usable]
        if not len(rows):
            return 0.0
        _, group = np.unique(self._runs.roots()[rows[:, 0]], return_inverse=True)
        lengths = np.bincount(group.reshape(-1), weights=sums)
        return float((lengths**2).sum() / self.total)
