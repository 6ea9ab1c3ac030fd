"""Count labelled voxels in the cells of a grid, decoding each stored chunk of a label once.

A grid is given by its edges per axis, which need not be evenly spaced. Whatever set of patches is asked
about, take all their borders as edges: every patch is then a whole number of cells, and its exact counts
    follow from
cumulative sums over cells (a summed-area table, one axis at a time).
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scripts.errors import VolumenError

MAX_CLASSES = 63
"""Classes whose presence can be recorded per target: one bit of an unsigned 64-bit cell each."""

MIN_TILE_VOXELS = 64**3
"""Smaller chunks are read several at a time, since each read costs a fixed overhead."""

MAX_TILE_VOXELS = 256**3
"""Larger chunks (a whole compressed NIfTI file) are looked at in slabs, to bound memory."""

_MAX_SHARED_TILE_VOXELS = 128**3


@dataclass(frozen=True)
class CountRequest:
    """What to record for a target's label.

    Args:
        ignore: label value that means unknown, or None.
        known: also count the voxels whose label is known (inside the mask and not `ignore`).
        foreground: also count the known voxels with a label other than 0.
        extent: also record the bounding box of the labelled voxels of each cell.
        classes: label values (at most 63) whose presence is recorded per cell.
    """

    ignore: int | None = None
    known: bool = False
    foreground: bool = False
    extent: bool = False
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.classes) > MAX_CLASSES:
            raise ValueError(f"at most {MAX_CLASSES} classes can be recorded, got {len(self.classes)}")


@dataclass
class CellCounts:
    """Counts over the cells of one grid; arrays have one entry per cell.

    Args:
        edges: ascending voxel coordinates per axis; cell i spans edges[i] to edges[i + 1].
        labelled: number of labelled voxels: mask > 0 where there is a mask, else label != 0; never `ignore`.
        known: number of known voxels, or None if it was not asked for.
        foreground: number of known voxels with a label other than 0, or None.
        low, high: per axis, the first and one past the last labelled coordinate in a cell (a cell
            without labelled voxels holds the largest and smallest integer), or empty.
        classes: bit i set where the i-th requested class is present, or None.
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

        def zeros(dtype: type = np.uint32) -> np.ndarray:
            return np.zeros(shape, dtype)

        limits = np.iinfo(np.int32)
        return cls(
            edges=tuple(edges),
            labelled=zeros(),
            known=zeros() if request.known else None,
            foreground=zeros() if request.foreground else None,
            low=[np.full(shape, limits.max, np.int32) for _ in shape] if request.extent else [],
            high=[np.full(shape, limits.min, np.int32) for _ in shape] if request.extent else [],
            classes=zeros(np.uint64) if request.classes else None,
        )


class LabelCounter:
    """Counts one target of one case over several grids in one pass.

    Args:
        label: the label volume (`shape`, `chunks`, `read(region) -> (channels, *region)`).
        mask: the volume whose positive voxels are labelled, or None.
        grids: edges per axis, for each grid.
        request: what to record.
        visit: called with every tile's region and per-voxel flags instead of counting cells.
    """

    def __init__(
        self,
        label: Any,
        mask: Any | None,
        grids: Sequence[Sequence[np.ndarray]],
        request: CountRequest,
        visit: Callable[[tuple[slice, ...], dict[str, np.ndarray]], None] | None = None,
    ) -> None:
        self.counts = [CellCounts.empty(edges, request) for edges in grids]
        self._label = label
        self._mask = mask
        self._request = request
        self._needs_label = mask is None or bool(
            request.foreground or request.classes or request.ignore is not None
        )
        self._stored = _StoredChunks(label)
        self._tables = _class_table(request.classes) if request.classes else None
        self._lock = threading.Lock()
        self._visit = visit or self._count_cells

    def jobs(self) -> list[Callable[[], None]]:
        """Return one callable per tile of the label that can hold something to count.

        They may run in any order and in several threads; `counts` is complete when all have run.
        """
        tile = _tile_shape(self._label, self._mask)
        regions = list(self._regions(tile))
        return [lambda region=region: self._count_tile(region) for region in regions]  # type: ignore[misc]

    def _regions(self, tile: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        wanted: set[tuple[int, ...]] = set()
        for counts in self.counts:
            spans = [
                range(int(edges[0]) // size, -(-int(edges[-1]) // size))
                for edges, size in zip(counts.edges, tile)
            ]
            wanted.update(itertools.product(*spans))
        for index in sorted(wanted):
            region = tuple(
                slice(i * size, min((i + 1) * size, n)) for i, size, n in zip(index, tile, self._label.shape)
            )
            if self._mask is None and self._stored.is_zero(region) and not self._counts_zero():
                continue
            yield region

    def _counts_zero(self) -> bool:
        """Tell whether a voxel with label 0 outside any mask adds to a count."""
        return self._request.known and self._request.ignore != 0

    def _count_tile(self, region: tuple[slice, ...]) -> None:
        inside = None
        if self._mask is not None:
            inside = _any_channel(_read(self._mask, region) > 0)
            if not inside.any():
                return
        label = None
        if self._needs_label and not self._stored.is_zero(region):
            label = _read(self._label, region)
        self._visit(region, self._flags(label, inside, tuple(s.stop - s.start for s in region)))

    def _count_cells(self, region: tuple[slice, ...], flags: dict[str, np.ndarray]) -> None:
        for counts in self.counts:
            self._add(counts, region, flags)

    def _flags(
        self, label: np.ndarray | None, inside: np.ndarray | None, shape: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """Return per-voxel arrays to be summed up per cell; what would add nothing is left out."""
        request = self._request
        ignored = None
        if request.ignore is not None:
            if label is not None:
                ignored = _any_channel(label == request.ignore)
            elif request.ignore == 0:
                ignored = np.ones(shape, bool)
        known = inside
        if ignored is not None:
            known = ~ignored if inside is None else inside & ~ignored
        foreground = None
        if label is not None:
            foreground = _any_channel(label != 0)
            if known is not None:
                foreground &= known
        labelled = foreground if inside is None else known
        found = {"labelled": labelled}
        if request.known:
            found["known"] = known if known is not None else np.ones(shape, bool)
        if request.foreground:
            found["foreground"] = foreground
        flags = {name: flag for name, flag in found.items() if flag is not None and flag.any()}
        if self._tables is not None and label is not None and foreground is not None and foreground.any():
            flags["classes"] = _class_bits(label, self._tables, foreground)
        return flags

    def _add(self, counts: CellCounts, region: tuple[slice, ...], flags: dict[str, np.ndarray]) -> None:
        cuts, cells, inner = [], [], []
        for edges, span in zip(counts.edges, region):
            start, stop = max(span.start, int(edges[0])), min(span.stop, int(edges[-1]))
            if start >= stop:
                return
            first = int(np.searchsorted(edges, start, side="right")) - 1
            last = int(np.searchsorted(edges, stop, side="left"))
            cut = np.clip(edges[first : last + 1], start, stop) - start
            cuts.append(cut)
            cells.append(slice(first, last))
            inner.append(slice(start - span.start, stop - span.start))
        where, crop = tuple(cells), tuple(inner)
        sums = {name: _cell_sums(flags[name][crop], cuts) for name in flags if name != "classes"}
        bits = _cell_bits(flags["classes"][crop], cuts) if "classes" in flags else None
        box = None
        if self._request.extent and "labelled" in flags:
            origin = [span.start + part.start for span, part in zip(region, inner)]
            box = _cell_extents(flags["labelled"][crop], cuts, origin)
        with self._lock:
            for name, values in sums.items():
                getattr(counts, name)[where] += values
            if bits is not None and counts.classes is not None:
                counts.classes[where] |= bits
            if box is not None:
                for axis, (low, high) in enumerate(box):
                    np.minimum(counts.low[axis][where], low, out=counts.low[axis][where])
                    np.maximum(counts.high[axis][where], high, out=counts.high[axis][where])


class SliceCounter:
    """Counts the labelled voxels in every slice across every axis of one label volume, in one pass.

    Args:
        label: the label volume.
        mask: the volume whose positive voxels are labelled, or None.
        ignore: label value that is never labelled, or None.
    """

    def __init__(self, label: Any, mask: Any | None, ignore: int | None) -> None:
        self.profiles = [np.zeros(size, np.int64) for size in label.shape]
        whole = [np.array([0, size]) for size in label.shape]
        self._counter = LabelCounter(label, mask, [whole], CountRequest(ignore=ignore), visit=self._add)
        self._lock = threading.Lock()

    def jobs(self) -> list[Callable[[], None]]:
        """Return the work, see `LabelCounter.jobs`; `profiles` is complete when all have run."""
        return self._counter.jobs()

    def _add(self, region: tuple[slice, ...], flags: dict[str, np.ndarray]) -> None:
        labelled = flags.get("labelled")
        if labelled is None:
            return
        axes = range(labelled.ndim)
        sums = [np.count_nonzero(labelled, axis=tuple(a for a in axes if a != axis)) for axis in axes]
        with self._lock:
            for profile, span, values in zip(self.profiles, region, sums):
                profile[span] += values


class _StoredChunks:
    """Knows which chunks of a volume are absent and thus hold the fill value 0 without being decoded."""

    def __init__(self, volume: Any) -> None:
        grid = getattr(volume, "stored_chunks", None)
        self._stored: np.ndarray | None = grid() if callable(grid) else None
        if getattr(volume, "fill_value", 0) not in (0, None):
            self._stored = None
        self._chunks = tuple(volume.chunks)

    def is_zero(self, region: tuple[slice, ...]) -> bool:
        """Tell whether no stored chunk touches the region; False when the volume cannot tell."""
        if self._stored is None:
            return False
        window = tuple(slice(s.start // c, -(-s.stop // c)) for s, c in zip(region, self._chunks))
        return not self._stored[window].any()


def run_jobs(jobs: Iterable[Callable[[], None]], num_threads: int, done: Callable[[], Any]) -> None:
    """Run jobs in the calling thread or in a pool, calling `done` in the calling thread after each.

    At the first error, or at Ctrl-C, jobs that have not begun are dropped and the error is raised.
    """
    if num_threads <= 1:
        for job in jobs:
            job()
            done()
        return
    with ThreadPoolExecutor(num_threads) as pool:
        pending = {pool.submit(job) for job in jobs}
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def window_sums(cells: np.ndarray, first: Sequence[np.ndarray], last: Sequence[np.ndarray]) -> np.ndarray:
    """Sum cells over all windows of an outer grid of windows, one axis at a time.

    Args:
        cells: counts per cell, of any integer dtype.
        first, last: per axis, index of each window's first cell and one past its last.

    Returns:
        int64 array with one entry per combination of windows: shape (len(first[0]), len(first[1]), ...).
    """
    sums = cells
    for axis, (start, stop) in enumerate(zip(first, last)):
        total = np.cumsum(sums, axis=axis, dtype=np.int64)
        zero = np.zeros_like(total.take([0], axis))
        total = np.concatenate([zero, total], axis)
        sums = total.take(stop, axis) - total.take(start, axis)
    return sums


def window_extremes(
    cells: np.ndarray, first: Sequence[np.ndarray], last: Sequence[np.ndarray], ufunc: np.ufunc
) -> np.ndarray:
    """Reduce cells over all windows with np.minimum or np.maximum; arguments as for `window_sums`."""
    result = cells
    for axis, (start, stop) in enumerate(zip(first, last)):
        # reduceat takes the indices in pairs; the pad lets a window end at the last cell.
        pairs = np.stack([start, stop], 1).ravel()
        padded = np.concatenate([result, result.take([-1], axis)], axis)
        result = ufunc.reduceat(padded, pairs, axis=axis).take(np.arange(0, len(pairs), 2), axis)
    return result


def _read(volume: Any, region: tuple[slice, ...]) -> np.ndarray:
    try:
        return volume.read(region)
    except VolumenError:
        raise
    except Exception as error:
        where = ", ".join(f"{s.start}:{s.stop}" for s in region)
        raise VolumenError(
            volume.path,
            f"the region [{where}] cannot be read ({type(error).__name__}: {error})",
            remedy="the file may be damaged; write it again",
        ) from error


def _any_channel(flags: np.ndarray) -> np.ndarray:
    return flags[0] if len(flags) == 1 else np.any(flags, axis=0)


def _tile_shape(label: Any, mask: Any | None) -> tuple[int, ...]:
    """Choose the unit of reading: whole chunks of the label and, where that is not too large, of the mask."""
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


def _cell_sums(flags: np.ndarray, cuts: Sequence[np.ndarray]) -> np.ndarray:
    """Count the true voxels in each cell; cuts are the cells' borders within `flags`, ends included."""
    sums = flags.view(np.uint8)
    most = 1
    for axis, cut in enumerate(cuts):
        # The first axis carries nearly all the work: its sums stay in the narrowest type that cannot
        # overflow.
        most *= int(np.diff(cut).max())
        dtype = np.min_scalar_type(most)
        sums = _reduce_segments(sums, cut, axis, np.add, dtype)
    return sums


def _cell_bits(bits: np.ndarray, cuts: Sequence[np.ndarray]) -> np.ndarray:
    for axis, cut in enumerate(cuts):
        bits = _reduce_segments(bits, cut, axis, np.bitwise_or, bits.dtype)
    return bits.astype(np.uint64)


def _reduce_segments(
    values: np.ndarray, cut: np.ndarray, axis: int, ufunc: np.ufunc, dtype: Any
) -> np.ndarray:
    lead = (slice(None),) * axis
    parts = [
        ufunc.reduce(values[(*lead, slice(a, b))], axis=axis, dtype=dtype) for a, b in itertools.pairwise(cut)
    ]
    return np.stack(parts, axis)


def _cell_extents(
    flags: np.ndarray, cuts: Sequence[np.ndarray], origin: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return per axis the first and one past the last true coordinate of each cell, in volume coordinates."""
    limits = np.iinfo(np.int32)
    extents = []
    for axis, cut in enumerate(cuts):
        shadow = flags
        for other, other_cut in enumerate(cuts):
            if other != axis:
                shadow = _reduce_segments(shadow, other_cut, other, np.logical_or, bool)
        shadow = np.moveaxis(shadow, axis, -1)
        lows, highs = [], []
        for start, stop in itertools.pairwise(cut):
            part = shadow[..., start:stop]
            some = part.any(-1)
            begin = origin[axis] + int(start)
            lows.append(np.where(some, begin + part.argmax(-1), limits.max))
            highs.append(np.where(some, origin[axis] + int(stop) - part[..., ::-1].argmax(-1), limits.min))
        extents.append((np.stack(lows, axis).astype(np.int32), np.stack(highs, axis).astype(np.int32)))
    return extents


def _class_table(classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted class values and the bit that each sets."""
    dtype = np.min_scalar_type(2 ** max(len(classes), 1) - 1)
    order = np.argsort(classes, kind="stable")
    bits = np.array([1 << int(i) for i in order], dtype=dtype)
    return np.asarray(classes)[order], bits


def _class_bits(label: np.ndarray, table: tuple[np.ndarray, np.ndarray], known: np.ndarray) -> np.ndarray:
    values, bits = table
    codes = np.zeros(label.shape[1:], bits.dtype)
    for value, bit in zip(values.tolist(), bits):
        codes |= _any_channel(label == value) * bit
    codes *= known
    return codes
