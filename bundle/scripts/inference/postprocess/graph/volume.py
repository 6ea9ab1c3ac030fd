"""Instances of a volume in five steps: fragments per block, their joining, edges per block, their merging, numbers.

Steps per block may run in any order, in several threads or processes, and be repeated. Every finished step is a file,
so that an interrupted run continues. The result is the same for every division into blocks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from volumen.derived.distance_window import surroundings
from volumen.inference.postprocess.block_files import BlockFiles
from volumen.inference.postprocess.blocks import Region, block_box, block_counts
from volumen.inference.postprocess.graph.agglomerate import agglomerate
from volumen.inference.postprocess.graph.edges import (
    FACE_SUM,
    FACES,
    EdgeFiles,
    EdgeSums,
    RegionTable,
    links_of,
)
from volumen.inference.postprocess.graph.flooding import flood
from volumen.inference.postprocess.graph.fragments import pieces_of
from volumen.inference.postprocess.graph.landscape import CERTAIN, Heads
from volumen.inference.postprocess.graph.links import Fragments, join_pieces, shell_of
from volumen.inference.postprocess.graph.passes import check_faces
from volumen.inference.postprocess.graph.sources import Source
from volumen.utils.files.arrays import read_array
from volumen.utils.files.atomic import write_atomically

logger = logging.getLogger(__name__)

ONE = 0.9
"""Share of all voxels from which one instance is taken for a failure of what should part it."""
ReadHeads = Callable[[Region], Heads]
ReadMask = Callable[[Region], np.ndarray | None]
ReadLabels = Callable[[Region], np.ndarray]
Write = Callable[[Region, np.ndarray], None]
CancellationCheck = Callable[[], None]


@dataclass(frozen=True)
class Composition:
    """Of which regions the instances consist.

    Args:
        instance: instance of each region, 0 for none, int64 (regions + 1,); the place 0 means no region.
        places: a voxel of each region, int64 (regions + 1, axes).
        edges: regions of one instance that touch, int64 (n, 2).
        affinities: 1 minus the mean wall between them, float64 (n,).
    """

    instance: np.ndarray
    places: np.ndarray
    edges: np.ndarray
    affinities: np.ndarray


@dataclass(frozen=True)
class VolumeGraph:
    """The blocks of a volume, and the steps from its heads to its instances.

    `find_fragments` for each block, `join`, `find_edges` for each block, `agglomerate`, then `numbered` for each block.

    Args:
        shape: shape of the volume.
        block: shape of a block.
        source: how heads are read.
        folder: folder of the files.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    source: Source
    folder: Path

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.prod(block_counts(self.shape, self.block))

    @property
    def pieces(self) -> BlockFiles:
        """The files of the pieces of each block, and of the fragment of each piece."""
        return BlockFiles(self.folder / "flooded_pieces")

    @property
    def edges(self) -> EdgeFiles:
        """The files of the edges."""
        return EdgeFiles(self.folder / "edges")

    def create(self) -> None:
        """Create the folders.

        Raises:
            VolumenError: the volume has too many voxels.
        """
        check_faces(self.shape)
        for folder in (self.pieces.folder, self.edges.folder):
            folder.mkdir(parents=True, exist_ok=True)

    def box(self, number: int) -> Region:
        """Return the region of a block."""
        return block_box(number, self.shape, self.block)

    def find_fragments(
        self,
        number: int,
        heads: ReadHeads,
        mask: ReadMask,
        write: Write,
        raise_if_cancelled: CancellationCheck,
    ) -> None:
        """Find the pieces of a block unless they are known.

        Args:
            number: number of the block.
            heads: reads the heads of a region.
            mask: reads where instances may be, bool, or returns None for everywhere.
            write: writes the numbers of the pieces of a region, uint32, which are unique within the block only.
            raise_if_cancelled: called before anything is written.
        """
        if self.pieces.has(number):
            return
        box = self.box(number)
        outer, inner = surroundings(self.shape, box, self.source.halo)
        landscape = self.source.landscape(heads(outer), mask(outer))
        first = [part.start for part in outer]
        pieces = pieces_of(landscape, inner, self.shape, first)
        raise_if_cancelled()
        write(box, pieces.labels)
        names = ("ends", "sizes", "lowest", "seeds", "bottoms")
        content = {name: getattr(pieces, name) for name in names}
        self.pieces.save(number, {**content, **shell_of(pieces.labels, box, self.shape)})

    def join(self) -> int:
        """Join the pieces of all blocks to fragments, unless that is done, and return the number of fragments."""
        if not self.pieces.has_table:
            found = join_pieces(self.pieces.load, self.shape, self.block)
            self._forget_changed(found)
            for name in ("sizes", "lowest", "seeds", "bottoms"):
                write_atomically(self._file(name), partial(np.save, arr=getattr(found, name)))
            self.pieces.save_table(found.offsets, found.number)
            self._before.unlink(missing_ok=True)
        return len(read_array(self._file("sizes")))

    def forget(self, region: Region) -> None:
        """Forget what depends on a region of the heads, which has changed; the other blocks need not be read again.

        Afterwards, repeat all steps: those of blocks that are still valid return at once.

        Args:
            region: in the volume.
        """
        if self.pieces.has_table and not self._before.exists():
            bottoms = read_array(self._file("bottoms"), mapped=False)
            tables = [bottoms[self.pieces.table(number).astype(np.int64) - 1] for number in range(self.count)]
            before = {str(number): table for number, table in enumerate(tables)}
            content: Any = before
            write_atomically(self._before, lambda stream: np.savez(stream, **content))
        halo = [(width, width) for width in self.source.halo]
        again = [number for number, _ in self._parts(self._widened(region, halo))]
        self.pieces.forget(again)
        # Its pieces may change everywhere in a block, as one flooding depends on another.
        for number in again:
            self._forget_edges_at(self.box(number))
        behind = [
            (after + width, before + width)
            for (before, after), width in zip(self.source.edge_halo, self.source.halo, strict=True)
        ]
        for number, _ in self._parts(self._widened(region, behind)):
            self.edges.forget(number)

    def _forget_changed(self, found: Fragments) -> None:
        """Forget the edges of the blocks of which, or around which, a piece belongs to another fragment than before."""
        if not self._before.exists():
            return
        with np.load(self._before) as content:
            for number in range(self.count):
                part = slice(found.offsets[number], found.offsets[number + 1])
                now = found.bottoms[found.number[part].astype(np.int64) - 1]
                if not np.array_equal(now, content[str(number)]):
                    self._forget_edges_at(self.box(number))

    def _forget_edges_at(self, region: Region) -> None:
        """Forget the edges of the blocks that read the fragments of a region."""
        behind = [(after, before) for before, after in self.source.edge_halo]
        for number, _ in self._parts(self._widened(region, behind)):
            self.edges.forget(number)

    def _widened(self, region: Region, widths: Sequence[tuple[int, int]]) -> Region:
        """Return a region with voxels before and behind it, within the volume."""
        return tuple(
            slice(max(part.start - before, 0), min(part.stop + behind, n))
            for part, (before, behind), n in zip(region, widths, self.shape, strict=True)
        )

    def find_edges(
        self,
        number: int,
        labels: ReadLabels,
        heads: ReadHeads,
        mask: ReadMask,
        raise_if_cancelled: CancellationCheck,
    ) -> None:
        """Sum the edges of a block unless they are known.

        Args:
            number: number of the block.
            labels: reads the numbers that `find_fragments` wrote.
            heads, mask: see `find_fragments`.
            raise_if_cancelled: called before anything is written.
        """
        if self.edges.has(number):
            return
        box = self.box(number)
        near = self._widened(box, self.source.edge_halo)
        wide = self._widened(near, [(width, width) for width in self.source.halo])
        values = heads(wide)
        landscape = self.source.landscape(values, mask(wide)).cropped(_inside(near, wide))
        owned = {name: head[(slice(None), *_inside(box, wide))] for name, head in values.items()}
        first = [part.start for part in near]
        sums = EdgeSums(self._fragments(near, labels), _inside(box, near), first, self.shape)
        self.source.add_edges(sums, landscape, owned, _inside(box, near))
        raise_if_cancelled()
        rows = sums.rows()
        rows[:, :2] = read_array(self._file("bottoms"))[rows[:, :2] - 1]
        self.edges.save(number, rows)

    def agglomerate(self) -> int:
        """Flood the fragments of all blocks, then merge regions and number instances; return how many there are."""
        seeds = read_array(self._file("seeds"), mapped=False)
        self.edges.merge(self.count, read_array(self._file("bottoms"), mapped=False), seeds)
        sizes, lowest = (read_array(self._file(name), mapped=False) for name in ("sizes", "lowest"))
        final = merge_regions(self.edges.table(), self.edges.regions(), sizes, lowest, self.source)
        write_atomically(self._file("final"), lambda stream: np.save(stream, final))
        warn_of_one(final, sizes, self.source)
        return int(final.max(initial=0))

    def numbered(self, number: int, labels: ReadLabels) -> tuple[Region, np.ndarray]:
        """Return the region of a block and its final numbers, uint32.

        Args:
            number: number of the block.
            labels: reads the numbers that `find_fragments` wrote.
        """
        return self._mapped(number, labels, read_array(self._file("final")))

    def regions(self, number: int, labels: ReadLabels) -> tuple[Region, np.ndarray]:
        """Return the region of a block and the numbers of its flooded regions, uint32, of which instances consist."""
        return self._mapped(number, labels, self.edges.regions())

    def composition(self) -> Composition:
        """Return of which regions the instances consist."""
        region = self.edges.regions().astype(np.int64)
        bottoms, final = read_array(self._file("bottoms"), mapped=False), read_array(self._file("final"))
        count = int(region.max(initial=0))
        instance, place = np.zeros((2, count + 1), np.int64)
        instance[region] = final
        instance[0] = 0
        first = np.unique(region, return_index=True)
        place[first[0]] = bottoms[first[1]]
        where = np.stack(np.unravel_index(place, self.shape), axis=1)
        table = self.edges.table()
        sides = instance[table[:, :2]]
        inner = table[(table[:, FACES] > 0) & (sides[:, 0] > 0) & (sides[:, 0] == sides[:, 1])]
        walls = inner[:, FACE_SUM] / (2 * CERTAIN * inner[:, FACES])
        return Composition(instance, where, inner[:, :2], 1 - walls)

    def _mapped(self, number: int, labels: ReadLabels, of_fragment: np.ndarray) -> tuple[Region, np.ndarray]:
        box = self.box(number)
        pieces = self.pieces.table(number)
        found = np.array(of_fragment[pieces.astype(np.int64) - 1], np.uint32)
        return box, np.concatenate([np.zeros(1, np.uint32), found])[labels(box)]

    def _fragments(self, region: Region, labels: ReadLabels) -> np.ndarray:
        """Return the fragment numbers of a region, uint32, 0 for none."""
        found = np.empty([part.stop - part.start for part in region], np.uint32)
        for number, part in self._parts(region):
            table = np.concatenate([np.zeros(1, np.uint32), self.pieces.table(number)])
            found[_inside(part, region)] = table[labels(part)]
        return found

    def _parts(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Yield the number of every block that meets a region, and the part of the region in it."""
        counts = block_counts(self.shape, self.block)
        ranges = [
            range(part.start // side, -(-part.stop // side))
            for part, side in zip(region, self.block, strict=True)
        ]
        for index in np.ndindex(*(len(r) for r in ranges)):
            place = tuple(r[i] for r, i in zip(ranges, index, strict=True))
            number = int(np.ravel_multi_index(place, counts))
            box = self.box(number)
            yield (
                number,
                tuple(
                    slice(max(a.start, b.start), min(a.stop, b.stop))
                    for a, b in zip(box, region, strict=True)
                ),
            )

    @property
    def _before(self) -> Path:
        return self.folder / "before.npz"

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def merge_regions(
    table: np.ndarray, region: np.ndarray, sizes: np.ndarray, lowest: np.ndarray, source: Source
) -> np.ndarray:
    """Return the instance of each fragment, uint32 from 1 without a gap, 0 for none and for small instances.

    Args:
        table: the edges between regions.
        region: region of each fragment, see `flood`.
        sizes: voxels of each fragment.
        lowest: the lowest height of each fragment.
        source: how heads are read, and by which rules regions merge, see `agglomerate`.
    """
    regions = int(region.max(initial=0))
    deepest = np.full(regions + 1, CERTAIN)
    np.minimum.at(deepest, region, lowest)
    voxels = np.bincount(region, weights=sizes, minlength=regions + 1)
    rules = source.rules
    clusters = agglomerate(
        table, regions, source.agglomeration, rules.merge_threshold, deepest[1:], source.neck_power
    )
    cluster = np.concatenate([np.zeros(1, np.int64), clusters.astype(np.int64) + 1])
    total = np.bincount(cluster, weights=voxels)
    kept = np.flatnonzero(total >= rules.min_size)
    number = np.zeros(len(total), np.uint32)
    number[kept[kept > 0]] = np.arange(1, (kept > 0).sum() + 1)
    return number[cluster][region]


def warn_of_one(final: np.ndarray, sizes: np.ndarray, source: Source) -> None:
    """Warn where walls or affinities part hardly anything, since the result is useless and looks finished.

    Args:
        final: the instance of each fragment, 0 for none.
        sizes: voxels of each fragment.
        source: how heads are read.
    """
    rules = source.rules
    parted = rules.boundary or rules.affinities
    if parted is None or rules.foreground is not None or not final.any():
        return
    share = float(np.bincount(final, weights=sizes)[1:].max() / sizes.sum())
    if share > ONE:
        logger.warning(
            "instances: one of them has %.0f %% of all voxels: %s parts hardly any at the threshold of %g; find"
            " threshold and merge_threshold by volumen tune --instances",
            100 * share,
            parted,
            rules.threshold,
        )


def _inside(region: Region, around: Region) -> Region:
    """Return a region as a part of one that contains it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(region, around, strict=True))


def instances_of(heads: Heads, source: Source, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the instances of arrays in memory, uint32 (*space), 0 for none: the same as those of blocks.

    Args:
        heads: outputs of the heads, (C, *space).
        source: how they are read.
        mask: bool (*space), where instances may be; None: everywhere.
    """
    landscape = source.landscape(heads, mask)
    shape = landscape.wall.shape
    everything = tuple(slice(0, n) for n in shape)
    pieces = pieces_of(landscape, everything, shape, (0,) * len(shape))
    found = join_pieces(lambda *_: vars(pieces), shape, shape)
    numbers = np.concatenate([np.zeros(1, np.uint32), found.number])
    sums = EdgeSums(numbers[pieces.labels], everything)
    source.add_edges(sums, landscape, heads, everything)
    rows = sums.rows()
    region = flood(lambda: [links_of(rows)], found.seeds)
    table = RegionTable()
    table.add(rows, region)
    final = merge_regions(table.rows(), region, found.sizes, found.lowest, source)
    instances = final[found.number.astype(np.int64) - 1]
    return np.concatenate([np.zeros(1, np.uint32), instances])[pieces.labels]
