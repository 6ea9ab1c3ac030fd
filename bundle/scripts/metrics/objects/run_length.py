"""Expected run length: how far one can follow an object before the prediction breaks off or errs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from volumen.metrics.grid import BlockGrid
from volumen.metrics.topology.components import ComponentJoin, label_components
from volumen.utils.connected import roots_of


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


@dataclass
class RunTally:
    """Runs along the skeletons of the true objects of a mask, block by block.

    A run is a connected part (26 neighbours) of the truth's skeleton that lies in the prediction. Its length is its
    number of voxels.

    Args:
        grid: the blocks.
    """

    grid: BlockGrid
    skeleton_voxels: int = 0
    _rows: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._runs = ComponentJoin(self.grid)

    def add(self, number: int, skeleton: np.ndarray, pred: np.ndarray, first: int) -> None:
        """Add a block.

        Args:
            number: which block.
            skeleton: bool (Z, Y, X), that of the truth in the block and one plane behind it.
            pred: uint32, components of the prediction in the same array.
            first: what makes the numbers of `pred` those of the volume.
        """
        labels, count = label_components(skeleton & (pred > 0), 26)
        start = self._runs.add(number, labels, count)
        own = tuple(slice(0, part.stop - part.start) for part in self.grid.box(number))
        self.skeleton_voxels += int(np.count_nonzero(skeleton[own]))
        inner = labels[own].reshape(-1)
        used = np.flatnonzero(inner)
        runs, place, voxels = np.unique(inner[used], return_index=True, return_counts=True)
        component = pred[own].reshape(-1)[used][place].astype(np.int64) - 1 + first
        self._rows.append(np.column_stack([runs.astype(np.int64) - 1 + start, component, voxels]))

    def merge(self, other: RunTally, shift: int) -> None:
        """Add the blocks of another accumulator, whose components of the prediction are shifted by `shift`."""
        moved = self._runs.merge(other._runs)
        self.skeleton_voxels += other.skeleton_voxels
        self._rows += [rows + np.array([moved, shift, 0]) for rows in other._rows]

    def length(self, roots: np.ndarray, merged: np.ndarray) -> float:
        """Return the expected run length in voxels; NaN where the truth has no skeleton.

        Args:
            roots: joined number of each component of the prediction.
            merged: joined numbers of those that are mergers: nothing in them is a run.
        """
        if not self.skeleton_voxels:
            return math.nan
        rows = np.concatenate([np.zeros((0, 3), np.int64), *self._rows])
        rows = rows[~np.isin(roots[rows[:, 1]], merged)] if len(rows) else rows
        if not len(rows):
            return 0.0
        _, group = np.unique(self._runs.roots()[rows[:, 0]], return_inverse=True)
        lengths = np.bincount(group.reshape(-1), weights=rows[:, 2])
        return float((lengths**2).sum() / self.skeleton_voxels)
