"""Counts labelled voxels in the cells of a grid, decoding each stored chunk of a label once."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.formats.zarr_arrays.stored_chunks import absent_everywhere_but
from volumen.data.index.cells import (
    NONE_HIGH,
    NONE_LOW,
    AxisCut,
    cell_any,
    cell_extents,
    cell_sums,
)
from volumen.data.validity import holds_value, inside_mask
from volumen.utils.errors import VolumenError, file_fault
from volumen.utils.threads import cores, in_threads

MAX_CLASSES = 63
"""Largest number of classes per target whose presence can be recorded: one bit each of an unsigned 64-bit cell."""

ANY_OBJECT = -(2**63)
"""Stands for a class: any label except 0, for targets whose labels are no classes."""


def channel_class(channel: int) -> int:
    """Return what stands for a class that is a channel of a label: any value except 0 there."""
    return ANY_OBJECT + 1 + channel


MIN_TILE_VOXELS = 64**3
"""Smaller chunks are read several at a time, since each read has a fixed overhead."""

MAX_TILE_VOXELS = 256**3
"""Larger chunks (a whole compressed NIfTI file) are processed in slabs, to bound memory."""

_MAX_SHARED_TILE_VOXELS = 128**3

Region = tuple[slice, ...]
Tile = tuple[int, ...]


def default_threads() -> int:
    """Return how many threads read labels: one per CPU core that this process may use, at most 8."""
    return min(8, cores())


@dataclass(frozen=True)
class CountRequest:
    """The counts to record for a target's label.

    Args:
        ignore: label value that means unknown, or None.
        known: also count the voxels whose label is known (inside the mask and not `ignore`).
        foreground: also count the known voxels with a label other than 0.
        extent: also record the bounding box of the labelled voxels of each cell.
        classes: label values (at most 63), `ANY_OBJECT`, or channels as `channel_class`, whose presence is recorded
            per cell.
        objects_only: inside a mask, count only voxels with a label other than 0 as labelled, instead of all voxels.
    """

    ignore: int | None = None
    known: bool = False
    foreground: bool = False
    extent: bool = False
    classes: tuple[int, ...] = ()
    objects_only: bool = False

    def __post_init__(self) -> None:
        if len(self.classes) > MAX_CLASSES:
            raise VolumenError(
                "dataset_config.class_oversampling",
                f"at most {MAX_CLASSES} classes can be recorded, got {len(self.classes)}",
                remedy="set it to 0",
            )


@dataclass
class CellCounts:
    """Counts over the cells of one grid; arrays have one entry per cell.

    Args:
        edges: ascending voxel coordinates per axis; cell i spans edges[i] to edges[i + 1].
        labelled: number of labelled voxels: mask > 0 where there is a mask, else label != 0; never `ignore`.
        known: number of known voxels, or None if it was not requested.
        foreground: number of known voxels with a label other than 0, or None.
        low, high: per axis, the first and one past the last labelled coordinate in a cell (`NONE_LOW`,
            `NONE_HIGH` if nothing is labelled), or empty.
        classes: bit i is set if the i-th requested class is present, or None.
    """

    edges: tuple[np.ndarray, ...]
    labelled: np.ndarray
    known: np.ndarray | None = None
    foreground: np.ndarray | None = None
    low: list[np.ndarray] = field(default_factory=list)
    high: list[np.ndarray] = field(default_factory=list)
    classes: np.ndarray | None = None

    @classmethod
    def empty(cls, edges: Sequence[np.ndarray], request: CountRequest) -> CellCounts:
        """Return counts of zero for the grid with these edges."""
        shape = tuple(len(axis_edges) - 1 for axis_edges in edges)
        return cls(
            edges=tuple(edges),
            labelled=np.zeros(shape, np.uint32),
            known=np.zeros(shape, np.uint32) if request.known else None,
            foreground=np.zeros(shape, np.uint32) if request.foreground else None,
            low=[np.full(shape, NONE_LOW, np.int32) for _ in shape] if request.extent else [],
            high=[np.full(shape, NONE_HIGH, np.int32) for _ in shape] if request.extent else [],
            classes=np.zeros(shape, np.uint64) if request.classes else None,
        )


@dataclass
class _Flags:
    """Boolean arrays over the voxels of one tile; None means that all are False."""

    labelled: np.ndarray | None = None
    known: np.ndarray | None = None
    foreground: np.ndarray | None = None
    classes: dict[int, np.ndarray] = field(default_factory=dict)


class LabelReader:
    """Reads one target's label and mask tile by tile, each stored chunk of the label once.

    Args:
        label: the label volume (`shape`, `chunks`, `read(region) -> (channels, *region)`).
        mask: the volume whose positive voxels are labelled, or None.
        request: the counts to record.
    """

    def __init__(self, label: Any, mask: Any | None, request: CountRequest) -> None:
        self.label = label
        self.mask = mask
        self.request = request
        self.tile = _tile_shape(label, mask)
        self._needs_label = (
            mask is None
            or request.ignore is not None
            or request.foreground
            or request.objects_only
            or bool(request.classes)
        )
        self._stored = self._stored_tiles()
        self._scratch = threading.local()

    @property
    def reads_chunks_once(self) -> bool:
        """Whether no stored block is part of two tiles, so that caching decoded blocks is useless."""
        volumes = [v for v in (self.label, self.mask) if v is not None]
        return all(
            t % c == 0 or t >= n
            for volume in volumes
            for t, c, n in zip(self.tile, volume.chunks, volume.shape)
        )

    def tiles(self, grids: Sequence[Sequence[np.ndarray]]) -> list[Tile]:
        """Return the indices of the tiles that overlap the grids and may contain voxels to count."""
        chosen = self._tiles_to_read()
        boxes = [
            [(int(e[0]) // t, -(-int(e[-1]) // t)) for e, t in zip(edges, self.tile, strict=True)]
            for edges in grids
        ]
        if chosen is None:
            touched = np.zeros([-(-n // t) for n, t in zip(self.label.shape, self.tile)], bool)
            for box in boxes:
                touched[tuple(slice(low, high) for low, high in box)] = True
            return [tuple(index) for index in np.argwhere(touched).tolist()]
        inside = np.zeros(len(chosen), bool)
        for box in boxes:
            low, high = np.array(box).T
            inside |= ((chosen >= low) & (chosen < high)).all(axis=1)
        return [tuple(index) for index in chosen[inside].tolist()]

    def _tiles_to_read(self) -> np.ndarray | None:
        """Return the tiles that may contain voxels to count; None if each may."""
        found = []
        if self.mask is not None:
            mask = absent_everywhere_but(self.mask, 0)
            found += [mask.tiles(self.tile)] if mask is not None else []
        if self.mask is None or self.request.objects_only:
            label = absent_everywhere_but(self.label, 0, self.request.ignore)
            # Blocks that are not stored are known background, unless their value means unknown.
            if label is not None and (not self.request.known or label.fill == self.request.ignore):
                found.append(label.tiles(self.tile))
        if len(found) < 2:
            return found[0] if found else None
        shared = {tuple(tile) for tile in found[0].tolist()} & {tuple(tile) for tile in found[1].tolist()}
        return np.array(sorted(shared), np.int64).reshape(-1, len(self.tile))

    def region(self, tile: Tile) -> Region:
        """Return the voxels of a tile."""
        return tuple(slice(i * t, min((i + 1) * t, n)) for i, t, n in zip(tile, self.tile, self.label.shape))

    def flags(self, tile: Tile) -> _Flags:
        """Read a tile and return its flags; they are valid until this thread reads the next tile."""
        region = self.region(tile)
        inside = None
        if self.mask is not None:
            inside = inside_mask(_read(self.mask, region))
            if not inside.any():
                return _Flags()
        label = None
        if self._needs_label and (self._stored is None or tile in self._stored):
            label = _read(self.label, region)
            if not _any_value(label):
                label = None
        return self._classify(label, inside, tuple(s.stop - s.start for s in region))

    def _classify(
        self, label: np.ndarray | None, inside: np.ndarray | None, shape: tuple[int, ...]
    ) -> _Flags:
        """Compute the flags from label (None: all zero) and mask (None: no mask)."""
        request = self.request
        flags = _Flags()
        known = inside
        if request.ignore is not None and label is not None:
            trusted = ~holds_value(label, request.ignore)
            known = trusted if inside is None else inside & trusted
        elif request.ignore == 0:
            known = np.zeros(shape, bool)
        foreground = None
        if label is not None:
            foreground = self._nonzero(label)
            if known is not None:
                foreground &= known
        flags.labelled = foreground if inside is None or request.objects_only else known
        if request.known:
            flags.known = known if known is not None else np.ones(shape, bool)
        if request.foreground:
            flags.foreground = foreground
        if label is not None:
            for bit, value in enumerate(request.classes):
                if value == ANY_OBJECT:
                    holds = np.array(foreground)
                else:
                    in_channel = value < channel_class(MAX_CLASSES)
                    holds = label[value - channel_class(0)] != 0 if in_channel else holds_value(label, value)
                    if known is not None:
                        holds &= known
                if holds.any():
                    flags.classes[bit] = holds
        return flags

    def _nonzero(self, label: np.ndarray) -> np.ndarray:
        """Return where any channel is not 0, in memory that this thread reuses for its next tile.

        (New memory is mapped page by page, which takes longer than the comparison.)
        """
        if len(label) > 1:
            return np.any(label, axis=0)
        scratch = getattr(self._scratch, "flags", None)
        if scratch is None or scratch.shape != label.shape[1:]:
            scratch = self._scratch.flags = np.empty(label.shape[1:], bool)
        return np.not_equal(label[0], 0, out=scratch)

    def _stored_tiles(self) -> set[Tile] | None:
        """Return the tiles that overlap a stored chunk of the label, if all other tiles are 0."""
        stored = absent_everywhere_but(self.label, 0)
        if stored is None:
            return None
        return {tuple(tile) for tile in stored.tiles(self.tile).tolist()}


class LabelCounter:
    """Counts the labelled voxels of one target of one case over several grids in one pass.

    Args:
        reader: reader of the label.
        grids: edges per axis, for each grid.
    """

    def __init__(self, reader: LabelReader, grids: Sequence[Sequence[np.ndarray]]) -> None:
        self.reader = reader
        self.counts = [CellCounts.empty(edges, reader.request) for edges in grids]
        self.tiles = reader.tiles(grids)
        self._cuts = [self._axis_cuts(edges) for edges in grids]
        self._grids_of = self._find_grids()
        self._lock = threading.Lock()

    def _axis_cuts(self, edges: Sequence[np.ndarray]) -> list[dict[int, AxisCut]]:
        """Return, per axis, the cuts of the rows of tiles that a grid overlaps."""
        found = []
        for axis_edges, t, n in zip(edges, self.reader.tile, self.reader.label.shape):
            rows = range(int(axis_edges[0]) // t, -(-int(axis_edges[-1]) // t))
            cuts = {row: AxisCut.of(axis_edges, row * t, min((row + 1) * t, n)) for row in rows}
            found.append({row: cut for row, cut in cuts.items() if cut is not None})
        return found

    def _find_grids(self) -> dict[Tile, list[int]]:
        """Return the grids that overlap each tile."""
        found: dict[Tile, list[int]] = {tile: [] for tile in self.tiles}
        for number, axis_cuts in enumerate(self._cuts):
            if math.prod(len(rows) for rows in axis_cuts) > len(found):
                touched = [t for t in found if all(i in rows for i, rows in zip(t, axis_cuts))]
            else:
                touched = [t for t in itertools.product(*axis_cuts) if t in found]
            for tile in touched:
                found[tile].append(number)
        return found

    def count(self, tile: Tile) -> None:
        """Add a tile to the counts; tiles may be counted in any order and in several threads."""
        flags = self.reader.flags(tile)
        for number in self._grids_of[tile]:
            cuts = [rows[i] for rows, i in zip(self._cuts[number], tile)]
            self._add(self.counts[number], cuts, flags)

    def _add(self, counts: CellCounts, cuts: Sequence[AxisCut], flags: _Flags) -> None:
        crop = tuple(cut.crop for cut in cuts)
        where = tuple(cut.cells for cut in cuts)
        sums = [
            (total, cell_sums(flag[crop], cuts))
            for total, flag in (
                (counts.labelled, flags.labelled),
                (counts.known, flags.known),
                (counts.foreground, flags.foreground),
            )
            if total is not None and flag is not None
        ]
        bits = [(bit, cell_any(flag[crop], cuts)) for bit, flag in flags.classes.items()]
        with_extent = self.reader.request.extent and flags.labelled is not None
        extents = cell_extents(flags.labelled[crop], cuts) if with_extent else []  # type: ignore[index]
        with self._lock:
            for total, values in sums:
                total[where] += values
            for bit, present in bits:
                counts.classes[where] |= present.astype(np.uint64) << np.uint64(bit)  # type: ignore[index]
            for axis, (low, high) in enumerate(extents):
                np.minimum(counts.low[axis][where], low, out=counts.low[axis][where])
                np.maximum(counts.high[axis][where], high, out=counts.high[axis][where])


class SliceCounter:
    """Counts the labelled voxels in every slice across every axis of one label volume in one pass.

    Args:
        reader: of the label; the classes of its request are counted one by one too.
    """

    def __init__(self, reader: LabelReader) -> None:
        self.reader = reader
        self.profiles = self._zeros()
        self.class_profiles = [self._zeros() for _ in reader.request.classes]
        self.tiles = reader.tiles([[np.array([0, size]) for size in reader.label.shape]])
        self._lock = threading.Lock()

    def _zeros(self) -> list[np.ndarray]:
        return [np.zeros(size, np.int64) for size in self.reader.label.shape]

    @property
    def all_profiles(self) -> dict[str, list[np.ndarray]]:
        """The profiles of the labelled voxels with the key "", and those of value 2 with the key "=2"."""
        values = (f"={value}" for value in self.reader.request.classes)
        return {"": self.profiles, **dict(zip(values, self.class_profiles, strict=True))}

    def count(self, tile: Tile) -> None:
        """Add a tile to the profiles; see `LabelCounter.count`."""
        region = self.reader.region(tile)
        flags = self.reader.flags(tile)
        if flags.labelled is not None:
            self._add(self.profiles, flags.labelled, region)
        for bit, holds in flags.classes.items():
            self._add(self.class_profiles[bit], holds, region)

    def _add(self, profiles: list[np.ndarray], labelled: np.ndarray, region: Region) -> None:
        whole = [AxisCut.of(np.array([0, size]), 0, size) for size in labelled.shape]
        for axis, (profile, span) in enumerate(zip(profiles, region)):
            lines = AxisCut.of(np.arange(labelled.shape[axis] + 1), 0, labelled.shape[axis])
            cuts = [cut for cut in (*whole[:axis], lines, *whole[axis + 1 :]) if cut is not None]
            values = cell_sums(labelled, cuts).ravel()
            with self._lock:
                profile[span] += values


Counter = LabelCounter | SliceCounter


def count_case(
    counters: Mapping[str, Counter], num_threads: int, begin: Callable[[int], Any], done: Callable[[], Any]
) -> None:
    """Run the counters of one case.

    Args:
        counters: by target.
        num_threads: 1 reads in the calling thread.
        begin: called before the first tile, with the number of tiles.
        done: called in the calling thread after each tile.

    Raises:
        VolumenError: a label cannot be read. Tiles that have not started by then, or at Ctrl-C, are dropped.
    """
    jobs = [(counter, tile) for counter in counters.values() for tile in counter.tiles]
    begin(len(jobs))
    with BLOCKS.paused(all(counter.reader.reads_chunks_once for counter in counters.values())):
        for _ in in_threads(lambda job: job[0].count(job[1]), jobs, num_threads):
            done()


def _read(volume: Any, region: Region) -> np.ndarray:
    try:
        return volume.read(region)
    except VolumenError:
        raise
    except Exception as error:
        where = ", ".join(f"{s.start}:{s.stop}" for s in region)
        remedy = "the file may be damaged; write it again"
        raise file_fault(error, volume.path, f"the region [{where}] cannot be read", remedy=remedy) from error


def _any_value(label: np.ndarray) -> bool:
    # max() takes a third of the time of any(), because any() first converts integers.
    return bool(label.max()) if label.dtype.kind == "u" else bool(label.any())


def _tile_shape(label: Any, mask: Any | None) -> tuple[int, ...]:
    """Choose the shape of a tile: whole chunks of the label and, if that is not too large, of the mask."""
    shape = tuple(label.shape)
    tile = [min(int(c), n) for c, n in zip(label.chunks, shape)]
    if mask is not None:
        shared = [min(math.lcm(a, min(int(b), n)), n) for a, b, n in zip(tile, mask.chunks, shape)]
        if math.prod(shared) <= max(_MAX_SHARED_TILE_VOXELS, math.prod(tile)):
            tile = shared
    while math.prod(tile) < MIN_TILE_VOXELS:
        growable = [axis for axis, n in enumerate(shape) if tile[axis] < n]
        if not growable:
            break
        axis = min(growable, key=lambda a: tile[a])
        tile[axis] *= 2
    while math.prod(tile) > MAX_TILE_VOXELS and tile[0] > 1:
        tile[0] = -(-tile[0] // 2)
    return tuple(tile)
