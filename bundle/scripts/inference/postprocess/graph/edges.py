"""The table of edges between fragments: sums per block in sorted files, which are merged to one file for the volume.

A row describes two fragments: their numbers, the smaller one first (in the files of blocks the places of their
bottoms); their faces, the sum of the walls on both sides of these, and the lowest pass between them; their distant
pairs of voxels, and twice the sum of the walls between these. All are integers, so that the table does not depend on
the order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.derived.distance_window import three_axes
from volumen.inference.postprocess.graph import edge_kernels
from volumen.utils.files.arrays import read_array
from volumen.utils.files.atomic import write_atomically

FIRST, SECOND, FACES, FACE_SUM, LOWEST, PAIRS, PAIR_SUM = range(7)
"""Columns of the table."""
COLUMNS = 7
MERGED_ROWS = 1 << 21
"""Rows that are merged at once; memory holds about 400 MB for them, whatever the number of edges is."""
BINS = 1 << 12
"""Intervals of fragments by which the rows are counted before they are merged."""

Region = tuple[slice, ...]


class EdgeSums:
    """Sums the edges of one block.

    Args:
        labels: uint32 (*space), fragment numbers of the block and its surroundings, 0 for none.
        owned: the block as a part of the labels.
    """

    def __init__(self, labels: np.ndarray, owned: Region) -> None:
        self._pad = 3 - labels.ndim
        self._labels = np.ascontiguousarray(labels).reshape(three_axes(labels.shape))
        bounds = [(0, 1)] * self._pad + [(part.start, part.stop) for part in owned]
        self._owned = np.array(bounds, np.int64)
        self._keys = np.zeros(1 << 12, np.uint64)
        self._sums = np.zeros((1 << 12, edge_kernels.COLUMNS), np.int64)
        self._used = 0

    def add_faces(self, wall: np.ndarray | None, height: np.ndarray, links: np.ndarray | None = None) -> None:
        """Add the faces of the block's voxels towards the next voxel on every axis.

        Args:
            wall: uint16, shape of the labels; None: only the passes over the faces count.
            height, links: the same, see `Landscape`.
        """
        shape = self._labels.shape
        volume = np.zeros((0, 0, 0), np.uint16) if wall is None else np.ascontiguousarray(wall).reshape(shape)
        self._keys, self._sums, self._used = edge_kernels.sum_faces(
            self._labels,
            volume,
            np.ascontiguousarray(height).reshape(shape),
            three_links(links, shape),
            self._owned,
            self._keys,
            self._sums,
            self._used,
        )

    def add_offset(self, wall: np.ndarray, offset: Sequence[int], far: bool) -> None:
        """Add the pairs of the block's voxels and those at an offset.

        Args:
            wall: uint16, of the block's voxels.
            offset: voxels per axis.
            far: whether they count as distant pairs, else as faces.
        """
        volume = np.ascontiguousarray(wall).reshape(three_axes(wall.shape))
        step = np.array([0] * self._pad + list(offset), np.int64)
        self._keys, self._sums, self._used = edge_kernels.sum_offset(
            self._labels, volume, self._owned, step, far, self._keys, self._sums, self._used
        )

    def rows(self) -> np.ndarray:
        """Return the rows of the table, int64 (n, `COLUMNS`), sorted by both fragments."""
        at = np.flatnonzero(self._keys)
        at = at[np.argsort(self._keys[at])]
        keys = self._keys[at]
        low = np.uint64((1 << 32) - 1)
        pairs = np.stack([keys >> np.uint64(32), keys & low], axis=1).astype(np.int64)
        return np.concatenate([pairs, self._sums[at]], axis=1)


def three_links(links: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return links (axes, *space) as those of three axes, or as an array without any for None."""
    if links is None:
        return np.zeros((0, 0, 0, 0), np.uint16)
    out = np.zeros((3, *shape), np.uint16)
    out[3 - len(links) :] = links.reshape(-1, *shape)
    return out


def add_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows sorted by both fragments, those of the same fragments added up."""
    rows = rows[np.lexsort((rows[:, SECOND], rows[:, FIRST]))]
    if not len(rows):
        return rows
    new = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
    first = np.flatnonzero(np.concatenate([[True], new]))
    out = rows[first]
    for column in (FACES, FACE_SUM, PAIRS, PAIR_SUM):
        out[:, column] = np.add.reduceat(rows[:, column], first)
    out[:, LOWEST] = np.minimum.reduceat(rows[:, LOWEST], first)
    return out


class EdgeFiles:
    """The files of a volume's edges.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, number: int) -> bool:
        """Whether the rows of a block are written."""
        return self._run(number).exists()

    def save(self, number: int, rows: np.ndarray) -> None:
        """Write the rows of a block, with the places of bottoms in place of numbers."""
        write_atomically(self._run(number), lambda stream: np.save(stream, rows))

    def forget(self, number: int) -> None:
        """Remove the rows of a block, and the table."""
        self._table.unlink(missing_ok=True)
        self._run(number).unlink(missing_ok=True)

    def merge(self, blocks: int, bottoms: np.ndarray) -> None:
        """Merge the rows of all blocks to the table, unless it exists.

        Args:
            blocks: number of blocks.
            bottoms: place of the bottom of each fragment, ascending.
        """
        if self.has_table:
            return
        if not len(bottoms):
            write_atomically(self._table, b"")
            return
        runs = [read_array(self._run(number)) for number in range(blocks)]
        bounds = _intervals(runs, bottoms)
        cuts = np.array([np.searchsorted(run[:, FIRST], bounds) for run in runs])

        def write(stream: Any) -> None:
            for low, high in zip(cuts.T[:-1], cuts.T[1:], strict=True):
                parts = [run[a:b] for run, a, b in zip(runs, low, high, strict=True)]
                rows = add_rows(np.concatenate(parts))
                rows[:, :2] = np.searchsorted(bottoms, rows[:, :2]) + 1
                stream.write(rows.tobytes())

        write_atomically(self._table, write)

    @property
    def has_table(self) -> bool:
        """Whether the table is written."""
        return self._table.exists()

    def table(self) -> np.ndarray:
        """Return the table, int64 (edges, `COLUMNS`), mapped into memory."""
        count = self._table.stat().st_size // (8 * COLUMNS)
        if not count:
            return np.zeros((0, COLUMNS), np.int64)
        return np.memmap(self._table, np.int64, "r", shape=(count, COLUMNS))

    @property
    def _table(self) -> Path:
        return self.folder / "edges.bin"

    def _run(self, number: int) -> Path:
        return self.folder / f"run_{number}.npy"


def _intervals(runs: Sequence[np.ndarray], bottoms: np.ndarray) -> list[int]:
    """Return bounds of intervals of bottoms, each with at most `MERGED_ROWS` rows if it has more than one bin."""
    edges = np.unique(np.concatenate([bottoms[:: max(1, -(-len(bottoms) // BINS))], bottoms[-1:] + 1]))
    rows = np.zeros(len(edges) - 1, np.int64)
    for run in runs:
        rows += np.diff(np.searchsorted(run[:, FIRST], edges))
    bounds, total = [int(edges[0])], 0
    for number, count in enumerate(rows):
        if total and total + count > MERGED_ROWS:
            bounds.append(int(edges[number]))
            total = 0
        total += int(count)
    return [*bounds, int(edges[-1])]
