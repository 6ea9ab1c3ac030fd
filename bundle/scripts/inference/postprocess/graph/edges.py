"""The edges between fragments: sums per block in sorted files, and the table of edges between regions.

A row describes two fragments: their numbers, the smaller one first (in the files of blocks the places of their
bottoms); their faces, the sum of the walls on both sides of these, and the lowest pass between them, see `passes`;
their distant pairs of voxels, and twice the sum of the walls between these. All are integers, so that sums do not
depend on the order of additions. The table of regions has the same columns, with the height of the pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from volumen.derived.distance_window import three_axes
from volumen.inference.postprocess.graph import edge_kernels
from volumen.inference.postprocess.graph.flooding import flood
from volumen.inference.postprocess.graph.passes import FACE_BITS, NO_PASS
from volumen.utils.files.arrays import read_array
from volumen.utils.files.atomic import write_atomically

FIRST, SECOND, FACES, FACE_SUM, LOWEST, PAIRS, PAIR_SUM = range(7)
"""Columns of the table."""
COLUMNS = 7
ROWS = 1 << 18
"""Rows that are added up at once, at least."""
LINK = np.dtype([("first", "<u4"), ("second", "<u4"), ("over", "<i8")])
"""A pass between two fragments, as it is flooded."""
LINKS = 1 << 18
"""Links that are read at once."""

Region = tuple[slice, ...]


class EdgeSums:
    """Sums the edges of one block.

    Args:
        labels: uint32 (*space), fragment numbers of the block and its surroundings, 0 for none.
        owned: the block as a part of the labels.
        first: place of the labels in the volume; (): they are the volume.
        shape: shape of the volume; (): that of the labels.
    """

    def __init__(
        self, labels: np.ndarray, owned: Region, first: Sequence[int] = (), shape: Sequence[int] = ()
    ) -> None:
        self._pad = 3 - labels.ndim
        self._labels = np.ascontiguousarray(labels).reshape(three_axes(labels.shape))
        bounds = [(0, 1)] * self._pad + [(part.start, part.stop) for part in owned]
        self._owned = np.array(bounds, np.int64)
        self._first = np.array([0] * self._pad + list(first or (0,) * labels.ndim), np.int64)
        self._shape = np.array(three_axes(tuple(shape) or labels.shape), np.int64)
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
            self._first,
            self._shape,
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

    def merge(self, blocks: int, bottoms: np.ndarray, seeds: np.ndarray) -> None:
        """Flood the fragments of all blocks, and write regions and the table of their edges, unless it exists.

        Memory holds the rows of one block, 24 bytes per fragment and about 170 for each edge between regions.

        Args:
            blocks: number of blocks.
            bottoms: place of the bottom of each fragment, ascending.
            seeds: peaks in each fragment.
        """
        if self.has_table:
            return
        self._write_links(blocks, bottoms)
        region = flood(self._read_links, seeds)
        self._links.unlink()
        write_atomically(self._regions, lambda stream: np.save(stream, region))
        table = RegionTable()
        for number in range(blocks):
            table.add(self._numbered(number, bottoms), region)
        write_atomically(self._table, lambda stream: np.save(stream, table.rows()))

    @property
    def has_table(self) -> bool:
        """Whether the table is written."""
        return self._table.exists()

    def table(self) -> np.ndarray:
        """Return the table of edges between regions, int64 (edges, `COLUMNS`)."""
        return read_array(self._table, mapped=False)

    def regions(self) -> np.ndarray:
        """Return the region of each fragment, see `flood`."""
        return read_array(self._regions, mapped=False)

    def _write_links(self, blocks: int, bottoms: np.ndarray) -> None:
        with self._links.open("wb") as stream:
            for number in range(blocks):
                stream.write(links_of(self._numbered(number, bottoms)).tobytes())

    def _read_links(self) -> Iterator[np.ndarray]:
        with self._links.open("rb") as stream:
            while len(links := np.fromfile(stream, LINK, LINKS)):
                yield links

    def _numbered(self, number: int, bottoms: np.ndarray) -> np.ndarray:
        """Return the rows of a block by the numbers of fragments."""
        rows = read_array(self._run(number), mapped=False)
        rows[:, :2] = np.searchsorted(bottoms, rows[:, :2]) + 1
        return rows

    @property
    def _table(self) -> Path:
        return self.folder / "regions_table.npy"

    @property
    def _regions(self) -> Path:
        return self.folder / "regions.npy"

    @property
    def _links(self) -> Path:
        return self.folder / "links.bin"

    def _run(self, number: int) -> Path:
        return self.folder / f"rows_{number}.npy"


def links_of(rows: np.ndarray) -> np.ndarray:
    """Return the passes of the rows of fragments that touch, `LINK`."""
    rows = rows[rows[:, LOWEST] < NO_PASS]
    links = np.empty(len(rows), LINK)
    links["first"], links["second"], links["over"] = rows[:, FIRST], rows[:, SECOND], rows[:, LOWEST]
    return links


class RegionTable:
    """Adds up the edges between regions from those between fragments, block by block."""

    def __init__(self) -> None:
        self._found = np.zeros((0, COLUMNS), np.int64)
        self._new: list[np.ndarray] = []

    def add(self, rows: np.ndarray, region: np.ndarray) -> None:
        """Add the edges between fragments.

        Args:
            rows: by the numbers of fragments.
            region: region of each fragment, 0 for none.
        """
        pairs = np.sort(region[rows[:, :2] - 1].astype(np.int64), axis=1)
        apart = (pairs[:, 0] > 0) & (pairs[:, 0] != pairs[:, 1])
        rows = rows[apart]
        rows[:, :2] = pairs[apart]
        self._new.append(add_rows(rows))
        if sum(map(len, self._new)) > max(ROWS, len(self._found)):
            self._add_up()

    def rows(self) -> np.ndarray:
        """Return the table, sorted by both regions, with the heights of the passes."""
        self._add_up()
        found = self._found.copy()
        found[:, LOWEST] >>= FACE_BITS
        return found

    def _add_up(self) -> None:
        self._found = add_rows(np.concatenate([self._found, *self._new]))
        self._new = []
