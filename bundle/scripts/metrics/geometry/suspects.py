"""Where the labels may be wrong: what a model is sure of and the label denies, and the other way round.

Errors at a surface are left out: a voxel is suspect where it lies more than `MARGIN` away from what the other side
says. So each suspect is a piece of some size, and a prediction that follows the labels has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from volumen.metrics.geometry.distances import squared_to
from volumen.metrics.geometry.scale import Scale
from volumen.metrics.grid import BlockGrid, Region, inside
from volumen.metrics.topology.components import ComponentJoin, label_components
from volumen.utils.jit import compiled

MARGIN = 2.0
"""Smallest voxel sides by which a suspect lies apart from the other side."""
LEAST = {2: 16.0, 3: 64.0}
"""Size of the smallest suspect in an image and in a volume, in squares and cubes of the smallest voxel side."""
SURE = 0.8
"""Least probability of a confident prediction; a confident denial is at most 1 less this."""

Kind = Literal["missing_label", "wrong_label"]
Reason = Literal["continues", "alone"]
MISSING: Kind = "missing_label"
WRONG: Kind = "wrong_label"
CONTINUES: Reason = "continues"
ALONE: Reason = "alone"


@dataclass(frozen=True)
class Suspect:
    """A piece of a volume whose label may be wrong.

    Args:
        kind: "missing_label": predicted with confidence where the label is background; "wrong_label": labelled, and
            denied with confidence.
        reason: "continues" where it goes on from what both agree on, "alone" where it is a piece of its own.
        score: mean confidence of the prediction over its voxels, 0 to 1.
        voxels: how many there are.
        low: first voxel (z, y, x) of the box around it.
        high: the one behind its last.
        number: its number, from 1, among all pieces of the volume.
    """

    kind: Kind
    reason: Reason
    score: float
    voxels: int
    low: tuple[int, int, int]
    high: tuple[int, int, int]
    number: int


@dataclass(frozen=True)
class SuspectPiece:
    """Arrays of a region, each (Z, Y, X): a block, a halo and one plane behind the block.

    Args:
        box: the block, in the volume.
        outer: the region of the arrays.
        truth, pred, known: bool.
        probability: float32, of the class; None where decided labels came.
    """

    box: Region
    outer: Region
    truth: np.ndarray
    pred: np.ndarray
    known: np.ndarray
    probability: np.ndarray | None


@compiled
def _measure(labels, confidence, joined, sizes, totals, low, high, joins):
    """Add up what each number has: voxels, confidence, box, and whether any voxel is joined."""
    nz, ny, nx = labels.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                number = labels[z, y, x]
                if number == 0:
                    continue
                sizes[number] += 1
                totals[number] += confidence[z, y, x]
                joins[number] = joins[number] or joined[z, y, x]
                low[number, 0], high[number, 0] = min(low[number, 0], z), max(high[number, 0], z + 1)
                low[number, 1], high[number, 1] = min(low[number, 1], y), max(high[number, 1], y + 1)
                low[number, 2], high[number, 2] = min(low[number, 2], x), max(high[number, 2], x + 1)


@dataclass
class SuspectTally:
    """The suspects of one class of a volume and of one kind, block by block.

    Args:
        grid: the blocks.
        scale: voxel sizes.
        kind: which kind.
    """

    grid: BlockGrid
    scale: Scale
    kind: Kind
    _rows: list[np.ndarray] = field(default_factory=list)
    _confidence: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._join = ComponentJoin(self.grid)

    @property
    def halo(self) -> tuple[int, int, int]:
        """Voxels around a block that decide on its suspects and on those in the plane behind it."""
        flat = 3 - len(self.scale.spacing)
        widths = self.scale.voxels(MARGIN * self.scale.finest)
        return tuple(0 if axis < flat else width + 2 for axis, width in enumerate(widths))  # type: ignore[return-value]

    def add(self, number: int, piece: SuspectPiece) -> None:
        """Add a block with its halo."""
        labels, count, confidence, joined = self.components(piece)
        first = self._join.add(number, labels, count)
        own = tuple(slice(0, part.stop - part.start) for part in piece.box)
        sizes, totals = np.zeros(count + 1, np.int64), np.zeros(count + 1)
        low, high = np.full((count + 1, 3), np.iinfo(np.int64).max), np.zeros((count + 1, 3), np.int64)
        joins = np.zeros(count + 1, np.bool_)
        _measure(labels[own], confidence[own], joined[own], sizes, totals, low, high, joins)
        used = np.flatnonzero(sizes)
        start = np.array([part.start for part in piece.box])
        columns = (
            used - 1 + first,
            sizes[used],
            joins[used].astype(np.int64),
            low[used] + start,
            high[used] + start,
        )
        self._rows.append(np.column_stack(columns))
        self._confidence.append(totals[used])

    def components(self, piece: SuspectPiece) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """Return the numbers of suspect voxels in a block and the plane behind it, and how many there are.

        And the confidence of each voxel, float32, and whether it goes on from what both sides agree on, bool.
        """
        sure, other, confidence = self._sides(piece)
        near = squared_to(other, self.scale, MARGIN * self.scale.finest) <= (MARGIN * self.scale.finest) ** 2
        suspect = sure & ~near
        wide = inside(self.grid.around(piece.box, 0, 1), piece.outer)
        labels, count = label_components(np.ascontiguousarray(suspect[wide]), 26)
        joined = _grown(sure & near)
        return labels, count, confidence[wide], joined[wide]

    def _sides(self, piece: SuspectPiece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what is claimed, what the other side says, both bool, and how sure the prediction is, float32."""
        found = piece.probability
        if found is None:
            found = piece.pred.astype(np.float32)
        pred, truth = piece.pred & piece.known, piece.truth & piece.known
        if self.kind == MISSING:
            return pred & (found >= SURE), truth, found
        return truth & (found <= 1 - SURE) & ~pred, pred, 1 - found

    def merge(self, other: SuspectTally) -> None:
        """Add the blocks of another accumulator of the same volume."""
        shift = self._join.merge(other._join)
        self._rows += [rows + np.array([shift] + [0] * 8) for rows in other._rows]
        self._confidence += other._confidence

    def numbers(self, number: int, labels: np.ndarray) -> np.ndarray:
        """Return the numbers of a block's components as those of the whole volume, 0 outside any.

        Args:
            number: which block.
            labels: of `components`.
        """
        roots = np.concatenate([[0], self._join.roots() + 1])
        return np.asarray(roots[np.where(labels > 0, labels + self._join.first[number], 0)])

    def suspects(self, most: int) -> list[Suspect]:
        """Return the suspects once all blocks were added, those of the largest summed confidence first.

        Args:
            most: how many at most.
        """
        rows = np.concatenate([np.zeros((0, 9), np.int64), *self._rows])
        if not len(rows):
            return []
        totals = np.concatenate(self._confidence)
        root = self._join.roots()[rows[:, 0]]
        order = np.lexsort((*rows[:, 5:2:-1].T, root))
        rows, totals, root = rows[order], totals[order], root[order]
        first = np.flatnonzero(np.concatenate([[True], root[1:] != root[:-1]]))
        sizes = np.add.reduceat(rows[:, 1], first)
        found = zip(
            sizes.tolist(),
            np.add.reduceat(totals, first).tolist(),
            np.maximum.reduceat(rows[:, 2], first).tolist(),
            np.minimum.reduceat(rows[:, 3:6], first, axis=0).tolist(),
            np.maximum.reduceat(rows[:, 6:9], first, axis=0).tolist(),
            root[first].tolist(),
            strict=True,
        )
        ndim = len(self.scale.spacing)
        least = LEAST[ndim] * self.scale.finest**ndim / float(np.prod(self.scale.spacing))
        large = [row for row in found if row[0] >= least]
        large.sort(key=lambda row: (-round(row[1], 3), row[3]))
        return [
            Suspect(
                self.kind,
                CONTINUES if joins else ALONE,
                total / size,
                size,
                tuple(low),
                tuple(high),
                number + 1,
            )
            for size, total, joins, low, high, number in large[:most]
        ]


def _grown(mask: np.ndarray) -> np.ndarray:
    """Return a mask with the 26 neighbours of its voxels, bool (Z, Y, X)."""
    out = mask
    for axis in range(3):
        before = np.moveaxis(out, axis, 0)
        grown = before.copy()
        grown[1:] |= before[:-1]
        grown[:-1] |= before[1:]
        out = np.moveaxis(grown, 0, axis)
    return out


def piece_region(box: Region, grid: BlockGrid, halo: Sequence[int]) -> Region:
    """Return a block's region with a halo, cut at the volume's end."""
    return tuple(
        slice(max(0, part.start - width), min(n, part.stop + width))
        for part, width, n in zip(box, halo, grid.shape, strict=True)
    )
